import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.errors import CheckpointError, RequestError
from qengine.loaders import shapes
from qengine.loaders.names import ZERO_COND_MARKER
from qengine.loaders.source import open_model
from safetensors.torch import load_file, save_file


def spoil(path: Path, **changes: torch.Tensor | None) -> None:
    """Write a safetensors file again with tensors replaced, added, or (None) left out."""
    tensors = load_file(path) | {name.replace("__dot__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


@pytest.mark.parametrize(
    ("pipeline", "zero", "variant"),
    [
        ("QwenImagePipeline", False, "qwen-image"),
        ("QwenImageEditPipeline", False, "qwen-image-edit"),
        ("QwenImageEditPlusPipeline", False, "qwen-image-edit-2509"),
        ("QwenImageEditPlusPipeline", True, "qwen-image-edit-2511"),
    ],
)
def test_a_folder_is_opened_as_the_variant_that_its_files_say(folder, pipeline, zero, variant) -> None:
    source = open_model(folder(pipeline=pipeline, zero_cond_t=zero).path)
    assert (source.variant, source.defaults, source.notes) == (variant, variant, ())
    assert source.transformer.config["zero_cond_t"] is zero
    names = set(source.text_encoder.checkpoint.tensors)
    assert "language_model.layers.1.mlp.up_proj.weight" in names and "visual.merger.ln_q.weight" in names
    assert source.processor_config["max_pixels"] == 12845056 and source.processor_config["min_pixels"] == 3136


def test_E02_zero_cond_t_comes_from_the_config(folder) -> None:
    source = open_model(folder(zero_cond_t=True).path)
    assert source.transformer.config["zero_cond_t"] is True and source.variant == "qwen-image-edit-2511"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_E02_zero_cond_t_comes_from_the_marker_in_the_file(folder, prefix) -> None:
    model = folder()
    tensors = {prefix + name: tensor for name, tensor in load_file(model.dit).items()}
    save_file(tensors | {prefix + ZERO_COND_MARKER: torch.empty(0)}, model.dit)
    source = open_model(model.path)
    assert source.transformer.config["zero_cond_t"] is True and source.variant == "qwen-image-edit-2511"
    assert set(source.transformer.checkpoint.tensors) == set(shapes.transformer_shapes(source.transformer.config))
    single = open_model(dit=model.dit, vae=model.vae, text_encoder=model.text_encoder)
    assert single.variant == "qwen-image-edit-2511" and "marker" in single.notes[0]


def test_E02_zero_cond_t_comes_from_the_users_word_and_is_noted(folder) -> None:
    source = open_model(folder().path, model_version="edit-2511")
    assert source.transformer.config["zero_cond_t"] is True and source.variant == "qwen-image-edit-2511"
    assert "--model-version says edit-2511" in source.notes[0]
    assert open_model(folder().path, model_version="edit-2509").variant == "qwen-image-edit-2509"


def test_E02_a_2511_file_without_its_flag_is_refused_with_the_flag_to_give(folder) -> None:
    model = folder("Qwen-Image-Edit-2511")
    with pytest.raises(CheckpointError, match="named 2511") as caught:
        open_model(model.path)
    assert "--model-version edit-2511" in str(caught.value) and caught.value.exit_code == 4
    assert open_model(model.path, model_version="edit-2511").transformer.config["zero_cond_t"] is True
    named = model.dit.rename(model.dit.with_name("qwen_image_edit_2511_bf16.safetensors"))
    with pytest.raises(CheckpointError, match="named 2511"):
        open_model(dit=named, vae=model.vae, text_encoder=model.text_encoder)
    other = open_model(dit=named, vae=model.vae, text_encoder=model.text_encoder, model_version="edit-2509")
    assert other.variant == "qwen-image-edit-2509" and "named 2511 but runs as edit-2509" in other.notes[0]


def test_E02_contradicting_words_are_refused(folder) -> None:
    with pytest.raises(CheckpointError, match="must be edit-2511, as zero_cond_t of the file says, got edit-2509"):
        open_model(folder(zero_cond_t=True).path, model_version="edit-2509")
    with pytest.raises(CheckpointError, match="--model-version of a QwenImagePipeline must give qwen-image"):
        open_model(folder(pipeline="QwenImagePipeline").path, model_version="edit-2511")
    with pytest.raises(CheckpointError, match="zero_cond_t of a QwenImageEditPipeline must be false"):
        open_model(folder(pipeline="QwenImageEditPipeline", zero_cond_t=True).path)
    with pytest.raises(
        RequestError, match="must be one of original, edit, .*, z-image, z-image-turbo, got 'edit-2510'"
    ):
        open_model(folder().path, model_version="edit-2510")


@pytest.mark.parametrize("given", [("dit",), ("vae",), ("text_encoder",), ("dit", "vae"), ("vae", "text_encoder")])
def test_M05_some_of_the_three_files_without_the_others_are_a_usage_error(folder, given) -> None:
    model = folder()
    with pytest.raises(RequestError, match="must be given together") as caught:
        open_model(**{name: getattr(model, name) for name in given})
    absent = [f"--{name.replace('_', '-')}" for name in ("dit", "vae", "text_encoder") if name not in given]
    assert all(flag in str(caught.value.hint) for flag in absent) and caught.value.exit_code == 2


def test_M05_a_model_and_files_together_and_a_lone_tokenizer_are_usage_errors(folder) -> None:
    model = folder()
    with pytest.raises(RequestError, match="got both"):
        open_model(model.path, dit=model.dit, vae=model.vae, text_encoder=model.text_encoder)
    with pytest.raises(RequestError, match="--tokenizer must be given with"):
        open_model(tokenizer=model.path / "tokenizer")


def test_M05_three_single_files_open_as_the_folder_does(folder) -> None:
    model = folder(zero_cond_t=True)
    single = open_model(dit=model.dit, vae=model.vae, text_encoder=model.text_encoder)
    whole = open_model(model.path)
    assert single.variant == whole.variant
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(single, part), getattr(whole, part)
        assert ours.checkpoint.fingerprint == theirs.checkpoint.fingerprint and dict(ours.config) == dict(theirs.config)
    assert single.tokenizer_dir == model.path / "tokenizer" and "tokenizer taken from" in single.notes[-1]


def test_M05_single_files_need_a_version_where_they_cannot_tell(folder) -> None:
    model = folder()
    files = {"dit": model.dit, "vae": model.vae, "text_encoder": model.text_encoder}
    with pytest.raises(RequestError, match="--model-version must be given"):
        open_model(**files)
    for version, variant in (
        ("original", "qwen-image"),
        ("edit", "qwen-image-edit"),
        ("edit_2509", "qwen-image-edit-2509"),
    ):
        assert open_model(**files, model_version=version).variant == variant


def test_single_files_without_a_tokenizer_say_how_to_give_one(folder, tmp_path) -> None:
    model = folder()
    alone = tmp_path / "elsewhere" / "deep" / "te.safetensors"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(model.text_encoder.read_bytes())
    alone.with_name("config.json").write_text(model.text_encoder.with_name("config.json").read_text())
    files = {"dit": model.dit, "vae": model.vae, "text_encoder": alone, "model_version": "edit"}
    with pytest.raises(CheckpointError, match="must come with a tokenizer"):
        open_model(**files)
    with pytest.raises(CheckpointError, match="got neither"):
        open_model(**files, tokenizer=tmp_path)
    assert open_model(**files, tokenizer=model.path).tokenizer_dir == model.path / "tokenizer"


def test_missing_and_unexpected_keys_and_wrong_shapes_are_listed(folder) -> None:
    model = folder()
    spoil(model.dit, proj_out__dot__bias=None, extra=torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"1 missing: proj_out\.bias; 1 unexpected: extra"):
        open_model(model.path)
    model = folder()
    spoil(model.vae, quant_conv__dot__bias=torch.zeros(31, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias \[31\] instead of \[32\]"):
        open_model(model.path)
    model = folder()
    spoil(model.text_encoder, **{"visual.merger.ln_q.weight": None, "lm_head.weight": torch.zeros(50, 32)})
    with pytest.raises(CheckpointError, match=r"1 missing: visual\.merger\.ln_q\.weight\n") as caught:
        open_model(model.path)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("transformer", {"num_layers": 3}, "num_layers of the config must be 2, as the tensors say, got 3"),
        ("transformer", {"num_attention_heads": 4}, "num_attention_heads of the config must be 2"),
        ("transformer", {"axes_dims_rope": [4, 6, 8]}, "must add up to 16"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "must be QwenImageTransformer2DModel"),
        ("transformer", {"use_additional_t_cond": True}, "Qwen-Image-Layered"),
        ("vae", {"dim_mult": [1, 3]}, "dim_mult of the config must be"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean must have 16 values"),
        ("vae", {"attn_scales": [1.0]}, "attn_scales must be empty"),
        ("text_encoder", {"model_type": "qwen3_vl"}, "must be qwen2_5_vl"),
        ("text_encoder", {"text_config": {"hidden_size": 64}}, "must be 50, as the tensors say"),
    ],
)
def test_a_config_that_the_tensors_contradict_is_refused(folder, file, change, words) -> None:
    model = folder()
    edit_json(model.path / file / "config.json", **change)
    with pytest.raises(CheckpointError, match=words):
        open_model(model.path)


def test_parts_of_different_models_are_refused(folder) -> None:
    with pytest.raises(CheckpointError, match="text encoder's width must be 24, as the transformer expects, got 32"):
        open_model(folder(joint_attention_dim=24).path)
    with pytest.raises(CheckpointError, match="must be 32, as the transformer expects, got 64"):
        open_model(folder(in_channels=32, out_channels=8).path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"])
def test_a_folder_without_one_of_its_parts_is_refused_by_name(folder, part) -> None:
    model = folder()
    place = model.path / part
    for file in sorted(place.glob("*")) if place.is_dir() else [place]:
        file.unlink()
    with pytest.raises(CheckpointError, match=part):
        open_model(model.path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_pickled_weights_are_refused_unopened_with_the_way_to_convert_them(folder, suffix) -> None:
    model = folder()
    pickled = model.dit.rename(model.dit.with_suffix(suffix))
    pickled.write_bytes(b"\x80\x04never opened")
    with pytest.raises(CheckpointError, match="pickled") as caught:
        open_model(model.path)
    assert "save_file" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match="pickled"):
        open_model(dit=pickled, vae=model.vae, text_encoder=model.text_encoder)


def test_gguf_is_named_whatever_its_suffix(folder) -> None:
    model = folder()
    for name in ("x.gguf", "x.safetensors"):
        path = model.path / name
        path.write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
        with pytest.raises(CheckpointError, match="got GGUF"):
            open_model(dit=path, vae=model.vae, text_encoder=model.text_encoder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scaled_fp8": torch.zeros(0)}, "scaled_fp8"),
        ({"proj_out.scale_weight": torch.zeros(1)}, "scaled_fp8"),
        ({"proj_out.comfy_quant": torch.zeros(4, dtype=torch.uint8)}, "comfy_quant"),
        ({"proj_out.qweight": torch.zeros(4, dtype=torch.int32)}, "nunchaku or AWQ"),
        ({"proj_out.weight": torch.zeros(64, 32).to(torch.float8_e4m3fn)}, "raw fp8"),
        ({"proj_out.weight": torch.zeros(64, 32, dtype=torch.int8)}, "int8"),
    ],
)
def test_quantised_weights_are_refused_by_the_name_of_their_format(folder, change, words) -> None:
    model = folder()
    spoil(model.dit, **change)
    with pytest.raises(CheckpointError, match=f"must be bf16, fp16 or fp32, got .*{words}"):
        open_model(model.path)


def test_truncated_and_altered_weights_are_refused(folder) -> None:
    model = folder()
    data = model.vae.read_bytes()
    model.vae.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"must be {len(data)} bytes, got {len(data) - 1}: the file is truncated"):
        open_model(model.path)
    model.vae.write_bytes(data[:8] + b"[" + data[9:])
    with pytest.raises(CheckpointError, match="header must begin with"):
        open_model(model.path)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000, '"a"'])
def test_a_broken_config_is_refused(folder, text) -> None:
    model = folder()
    (model.path / "model_index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"model_index\.json must be a JSON"):
        open_model(model.path)


def test_another_pipeline_is_refused(folder) -> None:
    for pipeline in ("FluxPipeline", "QwenImageLayeredPipeline"):
        with pytest.raises(CheckpointError, match=f"must be one of QwenImagePipeline, .* got '{pipeline}'"):
            open_model(folder(pipeline=pipeline).path)


@pytest.mark.parametrize(
    ("name", "near"),
    [("qwen-image-edit-2512", "qwen-image-edit-2511"), ("qwen_image", "qwen-image"), ("tny", "tiny"), ("zzz", None)],
)
def test_an_unknown_model_name_suggests_the_nearest(name, near) -> None:
    with pytest.raises(CheckpointError, match=f"got '{name}'") as caught:
        open_model(name)
    assert (f"did you mean {near}" in str(caught.value.hint)) if near else ("qengine ls" in str(caught.value.hint))
    assert caught.value.exit_code == 4


def test_a_path_that_is_not_there_and_a_file_for_a_folder_are_refused(folder, tmp_path) -> None:
    for name in ("./nothing", str(tmp_path / "nothing" / "here")):
        with pytest.raises(CheckpointError, match="must be an existing folder"):
            open_model(name)
    with pytest.raises(CheckpointError, match="got the file") as caught:
        open_model(folder().dit)
    assert "--dit" in str(caught.value.hint)


def test_the_fingerprint_tells_models_apart_and_not_places(folder) -> None:
    one = open_model(folder("one").path)
    assert open_model(folder("two").path).fingerprint == one.fingerprint
    others = [
        open_model(folder("data", seed=1).path),
        open_model(folder("flag", zero_cond_t=True).path),
        open_model(folder("kind", pipeline="QwenImageEditPipeline").path),
    ]
    assert len({source.fingerprint for source in others} | {one.fingerprint}) == 4


def test_both_spellings_of_the_processors_limits_are_read(folder) -> None:
    model = folder()
    place = model.path / "processor" / "preprocessor_config.json"
    place.parent.mkdir()
    for document in (
        {"min_pixels": 784, "max_pixels": 3600},
        {"size": {"shortest_edge": 784, "longest_edge": 3600}},
        {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 3600}}, "processor_class": "X"},
    ):
        place.write_text(json.dumps(document))
        found = open_model(model.path).processor_config
        assert (found["min_pixels"], found["max_pixels"], found["patch_size"]) == (784, 3600, 14)
