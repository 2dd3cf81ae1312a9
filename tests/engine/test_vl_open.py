"""Opening a Qwen3-VL folder: what is accepted, and the one error for each thing that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.engine.vl import VLEmbeddingExtractor
from qengine.errors import CheckpointError, DeviceError, RequestError
from qengine.loaders.vl import chat_template, open_vl, variant_of, vl_shapes
from safetensors.torch import load_file, save_file
from vlpipelines import HIDDEN, LAYERS, TEMPLATES, picture, shared_vl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(shared_vl(), tmp_path / "vl")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_folder_opens_from_its_headers_alone() -> None:
    source = open_vl(shared_vl())
    assert (source.hidden_size, source.layers, source.variant) == (HIDDEN, LAYERS, "instruct")
    assert source.component.checkpoint.bytes_read == 0
    assert set(vl_shapes(source.component.config)) == set(source.component.checkpoint.tensors) - {"lm_head.weight"}
    assert (source.processor_config["patch_size"], source.processor_config["max_pixels"]) == (16, 64 * 32 * 32)


def test_the_shapes_of_the_4b_model_are_known() -> None:
    text = {
        **{"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    }
    vision = {
        **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3},
        **{"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 2560},
        **{"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
    }
    shapes = vl_shapes({"text_config": text, "vision_config": vision})
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 4_437_815_808


def test_a_hub_id_opens_what_the_cache_holds_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="must be a folder"):
        open_vl("Qwen/Qwen3-VL-tiny")
    repository, commit = tmp_path / "models--Qwen--Qwen3-VL-tiny", "0" * 40
    shutil.copytree(shared_vl(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert open_vl("Qwen/Qwen3-VL-tiny").folder == repository / "snapshots" / commit


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.language_model.", "language_model.model."),
        ("model.language_model.", "language_model."),
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
    ],
)
def test_other_spellings_of_the_names_are_the_same_model(folder: Path, before: str, after: str) -> None:
    file = weights(folder)
    stored = load_file(file)
    assert any(name.startswith(before) for name in stored)
    save_file({name.replace(before, after, 1): tensor for name, tensor in stored.items()}, file)
    names = open_vl(folder).component.checkpoint.tensors
    assert set(names) == set(open_vl(shared_vl()).component.checkpoint.tensors)


def test_an_index_of_shards_opens_as_one_file_does(folder: Path) -> None:
    file = weights(folder)
    stored = load_file(file)
    file.unlink()
    names = sorted(stored)
    parts = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    for part, held in parts.items():
        save_file({name: stored[name] for name in held}, folder / part)
    listing = {name: part for part, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listing}))
    ours, theirs = (
        VLEmbeddingExtractor.from_pretrained(place, torch_dtype="float32").raw(picture(64, 64), "a", (-2,)).hidden[-2]
        for place in (folder, shared_vl())
    )
    assert torch.equal(ours, theirs)


def test_V10_the_variant_follows_from_the_escaped_line_break_alone() -> None:
    assert variant_of(TEMPLATES["instruct"]) == "instruct"
    assert variant_of(TEMPLATES["thinking"]) == "thinking"
    assert variant_of("assistant\n<think>") == "instruct"
    assert variant_of(r"{{ 'assistant\n<think>' }}") == "thinking"


def test_the_chat_template_is_taken_from_the_newest_place(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda d: d.update(chat_template="old"))
    assert chat_template(folder) == TEMPLATES["instruct"]
    (folder / "chat_template.jinja").write_text("newest")
    assert chat_template(folder) == "newest"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").unlink()
    assert chat_template(folder) == "old"
    edit(folder / "tokenizer_config.json", lambda d: d.pop("chat_template"))
    with pytest.raises(CheckpointError, match="must hold a chat template, got none"):
        open_vl(folder)


def _text(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda d: change(d["text_config"]))


def _vision(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda d: change(d["vision_config"]))


def _zero_bytes(folder: Path) -> None:
    weights(folder).write_bytes(weights(folder).read_bytes()[:-1])


def _drop_tensor(folder: Path) -> None:
    stored = load_file(weights(folder))
    stored.pop("model.visual.pos_embed.weight")
    save_file(stored, weights(folder))


def _other_dtype(folder: Path) -> None:
    stored = {name: tensor.to(torch.int8) for name, tensor in load_file(weights(folder)).items()}
    save_file(stored, weights(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "must hold a config.json"),
        (lambda f: edit(f / "config.json", lambda d: d.update(model_type="qwen2_5_vl")), "model_type must be qwen3_vl"),
        (lambda f: edit(f / "config.json", lambda d: d.pop("text_config")), "text_config must be an object"),
        (_text(lambda d: d.update(num_hidden_layers="6")), "num_hidden_layers must be a whole number"),
        (_text(lambda d: d.update(num_hidden_layers=10**9)), "num_hidden_layers must be a whole number from 1 to 1024"),
        (_text(lambda d: d.update(hidden_size=128)), "out_hidden_size must be 128"),
        (_text(lambda d: d.update(num_hidden_layers=5)), "tensors of the Qwen3-VL model, got 11 unexpected"),
        (_text(lambda d: d.update(intermediate_size=90)), "tensors of the Qwen3-VL model, got 18 shape"),
        (_vision(lambda d: d.update(deepstack_visual_indexes=[2, 1])), "must be ascending vision layers"),
        (_vision(lambda d: d.update(deepstack_visual_indexes=[0, 9])), "must be ascending vision layers"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "must hold a preprocessor_config.json"),
        (lambda f: edit(f / "preprocessor_config.json", lambda d: d.update(patch_size=14)), "patch_size must be 16"),
        (lambda f: (f / "tokenizer.json").unlink(), "must hold tokenizer.json"),
        (lambda f: weights(f).unlink(), "must hold a safetensors file"),
        (_zero_bytes, "truncated"),
        (_drop_tensor, "got 1 missing: visual.pos_embed.weight"),
        (_other_dtype, "must be bf16, fp16 or fp32"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_clear_error(
    folder: Path, change: Callable[[Path], None], words: str
) -> None:
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        open_vl(folder)


def test_no_folder_a_file_and_a_tokenizer_with_other_ids_are_errors(folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "none", weights(folder)):
        with pytest.raises(CheckpointError, match="must be a folder in the layout of transformers"):
            open_vl(place)
    edit(folder / "config.json", lambda d: d.update(image_token_id=7))
    with pytest.raises(CheckpointError, match="vision tokens of the tokenizer must be"):
        VLEmbeddingExtractor.from_pretrained(folder).raw(picture(64, 64), None, (-2,))


def test_device_dtype_and_format_are_checked_when_opening() -> None:
    with pytest.raises(RequestError, match="device must be"):
        VLEmbeddingExtractor.from_pretrained(shared_vl(), device="tpu")
    with pytest.raises(RequestError, match="dtype must be"):
        VLEmbeddingExtractor.from_pretrained(shared_vl(), torch_dtype=torch.float16)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device must be"):
            VLEmbeddingExtractor.from_pretrained(shared_vl(), device="cuda")
