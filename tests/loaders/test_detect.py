"""Published sizes, as sparse files: right names, shapes and dtypes, and no data."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from qengine.errors import CheckpointError
from qengine.loaders import shapes
from qengine.loaders.checkpoint import Checkpoint
from qengine.loaders.component import open_text_encoder, open_transformer, open_vae
from qengine.loaders.detect import text_encoder_config, vae_config

REAL_DIT = {
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "in_channels": 64,
    "out_channels": 16,
}
REAL_VAE = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
REAL_VAE |= {"temperal_downsample": [False, True, True]}
REAL_TEXT = {
    "text_config": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "vision_config": {"hidden_size": 1280, "depth": 32, "intermediate_size": 3420, "out_hidden_size": 3584},
}


def sparse(path: Path, table: Mapping[str, tuple[int, ...]]) -> Path:
    header, start = {}, 0
    for name, shape in table.items():
        size = 2 * shapes.element_count({name: shape})
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return path


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_published_transformer_is_known_from_its_headers(tmp_path, prefix) -> None:
    table = shapes.transformer_shapes(REAL_DIT)
    assert shapes.element_count(table) == 20_430_401_088
    found = open_transformer(sparse(tmp_path / "dit.safetensors", {prefix + name: s for name, s in table.items()}))
    assert {key: found.config[key] for key in REAL_DIT} == REAL_DIT
    assert found.config["axes_dims_rope"] == [16, 56, 56] and found.checkpoint.nbytes == 2 * 20_430_401_088


def test_the_published_vae_is_known_from_its_headers(tmp_path) -> None:
    found = open_vae(sparse(tmp_path / "vae.safetensors", shapes.vae_shapes(REAL_VAE)))
    assert {key: found.config[key] for key in REAL_VAE} == REAL_VAE
    import inspect

    from diffusers import AutoencoderKLQwenImage

    stock = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    assert found.config["latents_mean"] == list(stock["latents_mean"].default)
    assert found.config["latents_std"] == list(stock["latents_std"].default)


def test_the_published_text_encoder_is_known_from_its_headers(tmp_path) -> None:
    table = shapes.text_encoder_shapes(REAL_TEXT)
    found = open_text_encoder(sparse(tmp_path / "te.safetensors", table))
    assert {key: found.config["text_config"][key] for key in REAL_TEXT["text_config"]} == REAL_TEXT["text_config"]
    assert found.config["vision_config"]["num_heads"] == 16
    from transformers import Qwen2_5_VLConfig

    config = Qwen2_5_VLConfig(**found.config)
    assert config.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert config.text_config.num_key_value_heads == 4 and config.vision_config.depth == 32


def test_sizes_that_headers_cannot_tell_are_refused_with_the_way_out(folder, tmp_path) -> None:
    model = folder()
    for file in (model.dit, model.text_encoder):
        file.with_name("config.json").unlink()
    for opened, file in ((open_transformer, model.dit), (open_text_encoder, model.text_encoder)):
        with pytest.raises(CheckpointError, match="without a config") as caught:
            opened(file)
        assert "config.json" in str(caught.value.hint)
    table = shapes.vae_shapes(REAL_VAE | {"base_dim": 4, "z_dim": 8})
    with pytest.raises(CheckpointError, match="latent channels must be 16"):
        vae_config(Checkpoint.open([sparse(tmp_path / "v.safetensors", table)]))


def test_files_of_another_kind_and_the_wan_layout_are_named(folder, tmp_path) -> None:
    model = folder()
    for opened, file, kind in (
        (open_transformer, model.vae, "Qwen-Image transformer"),
        (open_vae, model.dit, "Qwen image VAE"),
        (open_text_encoder, model.dit, "Qwen2.5-VL"),
    ):
        copy = tmp_path / f"{kind}.safetensors"
        copy.write_bytes(file.read_bytes())
        with pytest.raises(CheckpointError, match=f"must be a {kind}"):
            opened(copy)
    with pytest.raises(CheckpointError, match="Wan layout"):
        open_vae(sparse(tmp_path / "wan.safetensors", {"decoder.middle.0.residual.0.gamma": (4, 1, 1, 1)}))
    layered = shapes.transformer_shapes(REAL_DIT | {"num_layers": 1})
    layered["time_text_embed.addition_t_embedding.weight"] = (2, 3072)
    with pytest.raises(CheckpointError, match="Layered"):
        open_transformer(sparse(tmp_path / "layered.safetensors", layered))


def test_a_language_model_without_its_vision_tower_is_refused(tmp_path) -> None:
    table = {name: s for name, s in shapes.text_encoder_shapes(REAL_TEXT).items() if not name.startswith("visual.")}
    with pytest.raises(CheckpointError, match="with its vision tower"):
        text_encoder_config(Checkpoint.open([sparse(tmp_path / "te.safetensors", table)]))
