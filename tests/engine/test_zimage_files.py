"""Z-Image on disk: what is taken, under which names, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine import Engine
from qengine.engine.latents import pack
from qengine.engine.zimage import ZImageTransformer
from qengine.errors import CheckpointError, RequestError
from qengine.loaders import zimage
from qengine.loaders.component import Component
from qengine.loaders.variant import folder_variant, known_names, pipeline_classes, resolve_known, zimage_variant
from qengine.loaders.zimage import detect
from safetensors.torch import load_file, save_file
from zpipelines import build_zimage, open_zimage, shared_zimage

WEIGHTS = "diffusion_pytorch_model.safetensors"


def copy_part(name: str, folder: Path) -> Path:
    shutil.copytree(shared_zimage() / name, folder / name)
    return folder / name


def rewrite(part: Path, change: Any) -> Path:
    """Change the dict of tensors of a part in place."""
    file = next(part.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return part


def write_config(part: Path, **change: Any) -> Path:
    file = part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | change), "utf-8")
    return part


def velocity(component: Component) -> torch.Tensor:
    model = ZImageTransformer.load(component, device=torch.device("cpu"), dtype=torch.float32, cache=None)
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 16, 1, 6, 6, generator=generator), torch.randn(5, 48, generator=generator)
    with torch.no_grad():
        return model.velocity(pack(latents), model.contexts([prompt], 3, 3), model.table([0.5]), 0.5)[0]


def as_single_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as single files spell them, with fused queries, keys and values."""
    single = {"model.diffusion_model.norm_final.weight": torch.ones(64)}
    for name, tensor in tensors.items():
        if ".attention.to_q." in name:
            fused = torch.cat([tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            name, tensor = name.replace("to_q", "qkv"), fused
        elif ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        for ours, theirs in (
            ("all_x_embedder.2-1.", "x_embedder."),
            ("all_final_layer.2-1.", "final_layer."),
            ("attention.to_out.0.", "attention.out."),
            ("attention.norm_q.", "attention.q_norm."),
            ("attention.norm_k.", "attention.k_norm."),
        ):
            name = name.replace(ours, theirs)
        single["model.diffusion_model." + name] = tensor
    return single


def test_a_single_file_with_fused_attention_is_the_same_model(tmp_path: Path) -> None:
    tensors = load_file(shared_zimage() / "transformer" / WEIGHTS)
    save_file(as_single_file(tensors), tmp_path / "z_image_turbo.safetensors")
    shutil.copy(shared_zimage() / "transformer" / "config.json", tmp_path / "config.json")
    single = zimage.open_transformer(tmp_path / "z_image_turbo.safetensors")
    folder = zimage.open_transformer(shared_zimage() / "transformer")
    assert single.checkpoint.tensors.keys() == folder.checkpoint.tensors.keys()
    assert torch.equal(
        single.checkpoint.read("layers.1.attention.to_v.weight"), tensors["layers.1.attention.to_v.weight"]
    )
    assert torch.equal(velocity(single), velocity(folder))


def test_a_fused_tensor_that_is_no_three_matrices_is_refused(tmp_path: Path) -> None:
    part = copy_part("transformer", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.attention.qkv.weight"] = torch.zeros(64, 64)

    with pytest.raises(CheckpointError, match="multiple of 3 rows, got shape"):
        zimage.open_transformer(rewrite(part, change))


def test_configs_of_single_files_of_the_released_head_size_are_found(tmp_path: Path) -> None:
    folder = build_zimage(
        tmp_path / "z-image", dim=128, n_heads=1, n_kv_heads=1, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512]
    )
    stored = json.loads((folder / "transformer" / "config.json").read_text("utf-8"))
    for name in ("transformer", "text_encoder"):
        (folder / name / "config.json").unlink()
    file = next((folder / "transformer").glob("*.safetensors"))
    found = zimage.open_transformer(file).config
    assert {key: stored[key] for key in found} == dict(found)
    vae = detect.vae_config(zimage.open_vae(shared_zimage() / "vae").checkpoint)
    assert (vae["block_out_channels"], vae["scaling_factor"], vae["shift_factor"]) == ([8, 16, 24, 24], 0.3611, 0.1159)
    text = zimage.open_text_encoder(next((folder / "text_encoder").glob("*.safetensors"))).config
    assert (text["head_dim"], text["num_key_value_heads"], text["num_hidden_layers"]) == (16, 2, 3)


def test_the_tiny_heads_of_a_file_without_a_config_are_refused(tmp_path: Path) -> None:
    shutil.copy(shared_zimage() / "transformer" / WEIGHTS, tmp_path / "z.safetensors")
    with pytest.raises(CheckpointError, match="head size must be 128"):
        zimage.open_transformer(tmp_path / "z.safetensors")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("transformer", "layers.1.feed_forward.w3.weight"),
        ("vae", "decoder.up_blocks.1.resnets.0.norm1.bias"),
        ("text_encoder", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_missing_unknown_and_misshapen_tensors_are_named(name: str, tensor: str, tmp_path: Path) -> None:
    opener = {"transformer": zimage.open_transformer, "vae": zimage.open_vae, "text_encoder": zimage.open_text_encoder}
    inner = tensor.removeprefix("model.")
    for words, change in (
        (f"missing.*{inner}", lambda tensors: tensors.pop(tensor)),
        ("unexpected.*stranger", lambda tensors: tensors.update(stranger=torch.zeros(1))),
        (f"{inner} .* instead of", lambda tensors: tensors.update({tensor: torch.zeros(3)})),
    ):
        part = rewrite(copy_part(name, tmp_path / words[:4]), change)
        with pytest.raises(CheckpointError, match=words):
            opener[name](part)


def test_S24_parts_of_different_widths_are_refused(tmp_path: Path) -> None:
    folder = build_zimage(tmp_path / "z-image", text_hidden=32)
    with pytest.raises(CheckpointError, match="text encoder's width must be 48, as the transformer expects, got 32"):
        open_zimage(folder)
    source = open_zimage(shared_zimage())
    narrow = Component("vae", {**source.vae.config, "latent_channels": 4}, source.vae.checkpoint)
    with pytest.raises(CheckpointError, match="latent channels must be 16, as the transformer expects, got 4"):
        zimage.check_widths(source.transformer, narrow, source.text_encoder)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("transformer", {"n_layers": 4}, "n_layers of the config must be 3, as the tensors say, got 4"),
        ("transformer", {"cap_feat_dim": 2560}, "cap_feat_dim of the config must be 48"),
        ("transformer", {"siglip_feat_dim": 1152}, "got Z-Image-Omni"),
        ("transformer", {"_class_name": "Lumina2Transformer2DModel"}, "must be ZImageTransformer2DModel"),
        ("vae", {"latent_channels": 4}, "latent_channels of the config must be 16"),
        ("vae", {"use_quant_conv": True}, "use_quant_conv of the config must be False"),
        ("vae", {"norm_num_groups": 5}, "norm_num_groups must divide"),
        ("vae", {"shift_factor": None}, "shift_factor must be a number, got None"),
        ("text_encoder", {"num_attention_heads": 8}, "num_attention_heads of the config must be 4"),
        ("text_encoder", {"model_type": "qwen2"}, "model_type must be qwen3, got 'qwen2'"),
        ("text_encoder", {"attention_bias": True}, "attention_bias of Qwen3 must be false"),
    ],
)
def test_S24_a_config_that_the_tensors_contradict_is_refused(
    name: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    opener = {"transformer": zimage.open_transformer, "vae": zimage.open_vae, "text_encoder": zimage.open_text_encoder}
    with pytest.raises(CheckpointError, match=words):
        opener[name](write_config(copy_part(name, tmp_path), **change))


def test_the_original_layout_of_the_vae_is_refused_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "ae.safetensors"
    save_file({"decoder.up.0.block.0.norm1.weight": torch.zeros(8)}, file)
    with pytest.raises(CheckpointError, match="original layout") as caught:
        zimage.open_vae(file)
    assert "vae/diffusion_pytorch_model.safetensors" in (caught.value.hint or "")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"img_in.weight": torch.zeros(2, 2)}, file)
    for opener, kind in (
        (zimage.open_transformer, "Z-Image transformer"),
        (zimage.open_vae, "flux-type VAE"),
        (zimage.open_text_encoder, "Qwen3 text encoder"),
    ):
        with pytest.raises(CheckpointError, match=f"must be a {kind}"):
            opener(file)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Z-Image-Turbo",), "z-image-turbo"),
        (("Z-Image",), "z-image"),
        (("a1b2c3", "z-image-turbo"), "z-image-turbo"),
        (("a1b2c3", "", "Tongyi-MAI/Z-Image"), "z-image"),
        (("models/turbo/z_image",), "z-image"),
        (("zImageTurbo_fp16.safetensors",), "z-image-turbo"),
    ],
)
def test_the_name_tells_turbo_from_base(names: tuple[str, ...], expected: str) -> None:
    assert zimage_variant(names, None).name == expected


def test_the_user_overrules_the_name_and_is_asked_where_none_tells() -> None:
    assert zimage_variant(("Z-Image",), "z-image-turbo").name == "z-image-turbo"
    with pytest.raises(RequestError, match="no name says which Z-Image it is, got my-model") as caught:
        zimage_variant(("my-model", ""), None)
    assert "--model-version z-image or z-image-turbo" in (caught.value.hint or "")
    with pytest.raises(CheckpointError, match="must be z-image or z-image-turbo, got edit-2511"):
        zimage_variant(("Z-Image",), "edit-2511")
    for pipeline in ("ZImagePipeline", "ZImageImg2ImgPipeline"):
        assert pipeline in pipeline_classes()
        found = folder_variant({"_class_name": pipeline}, {}, marked=False, names=("Z-Image",), model_version=None)
        assert (found.name, found.zero_cond_t) == ("z-image", False)
    with pytest.raises(CheckpointError, match="must give qwen-image-edit, got z-image"):
        index = {"_class_name": "QwenImageEditPipeline"}
        folder_variant(index, {}, marked=False, names=("x",), model_version="z-image")


def test_the_short_names_stand_for_the_published_models() -> None:
    assert resolve_known("z-image-turbo") == "Tongyi-MAI/Z-Image-Turbo"
    assert resolve_known("Z-Image") == "Tongyi-MAI/Z-Image"
    assert {"z-image", "z-image-turbo"} <= set(known_names())


def test_z_image_is_told_by_its_names(tmp_path: Path) -> None:
    assert zimage.is_zimage(shared_zimage() / "transformer")
    tensors = load_file(shared_zimage() / "transformer" / WEIGHTS)
    save_file(as_single_file(tensors), tmp_path / "single.safetensors")
    assert zimage.is_zimage(tmp_path / "single.safetensors")
    assert not zimage.is_zimage(shared_zimage() / "text_encoder")


def test_facts_of_the_transformer_are_its_config() -> None:
    component = zimage.open_transformer(shared_zimage() / "transformer")
    facts = detect.transformer_facts(component.checkpoint)
    assert facts == {key: component.config[key] for key in facts} and len(facts) == 6


def test_single_files_and_the_folder_make_the_same_picture(tmp_path: Path) -> None:
    copy_part("transformer", tmp_path)
    (part,) = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(part)
    part.unlink()
    dit = tmp_path / "transformer" / "z_image_turbo.safetensors"
    save_file(as_single_file(tensors), dit)
    files = {name: next((shared_zimage() / name).glob("*.safetensors")) for name in ("vae", "text_encoder")}
    made = []
    for choice in ({"model": shared_zimage()}, {"dit": dit, "tokenizer": shared_zimage() / "tokenizer", **files}):
        with Engine.open(**choice, device="cpu", cache_dir=tmp_path / "cache") as opened:
            assert opened.source.variant == "z-image-turbo" and opened.defaults.guidance_scale == 0
            made.append(opened.generate("a cat", size=(48, 32), num_inference_steps=2))
    assert torch.equal(made[0].latents, made[1].latents)
    assert made[0].image.tobytes() == made[1].image.tobytes()
