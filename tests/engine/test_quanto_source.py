"""A transformer stored in optimum-quanto's names runs as the model whose weights are its rows x scales."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import EditRequest, Engine
from qengine.engine.defaults import DEFAULTS
from qengine.engine.plan import Choices
from qengine.errors import CheckpointError
from qengine.kernels.quant import quantise_rows
from qengine.loaders import open_model, quanto
from qengine.loaders.checkpoint import Checkpoint
from qengine.loaders.dequantised import DequantisedCheckpoint
from safetensors.torch import load_file, save_file

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    areas = {"area_pixels": 4096, "condition_area_pixels": 4096, "reference_area_pixels": 4096}
    monkeypatch.setitem(DEFAULTS, "qwen-image-edit-2511", replace(DEFAULTS["qwen-image-edit-2511"], **areas))


def models(folder: Path, weight_format: str) -> tuple[Path, Path]:
    """The same pipeline with its transformer in quanto's names, and with what those rows stand for."""
    stored, plain = folder / "stored", folder / "plain"
    for place in (stored, plain):
        shutil.copytree(shared_pipeline("edit-2511"), place)
    tensors = load_file(stored / "transformer" / FILE)
    matrices = {name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2}
    rows = {n: quantise_rows(tensors[n], weight_format, 1, scale_dtype=torch.bfloat16) for n in sorted(matrices)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in matrices}
    quanto.write_quanto(stored / "transformer" / FILE, ((name, *pair) for name, pair in rows.items()), rest)
    values = {name: data.float() * scale.float()[:, None] for name, (data, scale) in rows.items()}
    save_file(rest | values, plain / "transformer" / FILE)
    return stored, plain


def latents(model: Path, cache: Path, **options: Any) -> torch.Tensor:
    picture = Image.effect_noise((64, 48), 60).convert("RGB")
    picture.putdata([(i % 251, i % 13 * 19, i % 7 * 36) for i in range(64 * 48)])
    request = EditRequest(images=(picture,), prompt="make it night", num_inference_steps=1, size=(48, 32), seed=3)
    with Engine.open(model, device="cpu", cache_dir=cache, **options) as engine:
        *_, decoded = engine.stream(request)
    return decoded.latents


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_M27_a_quanto_transformer_gives_the_bits_of_its_dequantised_weights(weight_format: str, tmp_path: Path) -> None:
    stored, plain = models(tmp_path, weight_format)
    options: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}, {"choices": Choices(weights=weight_format)}]
    seen = []
    for each in options:
        seen.append(latents(stored, tmp_path / "a", **each))
        assert torch.equal(seen[-1], latents(plain, tmp_path / "b", **each)), each
        assert seen[-1].isfinite().all() and not any(torch.equal(seen[-1], other) for other in seen[:-1])


def test_the_source_says_how_it_is_stored_and_reads_as_the_model(tmp_path: Path) -> None:
    stored, plain = models(tmp_path, "int8")
    source, whole = open_model(stored), open_model(plain)
    assert any("optimum-quanto's int8" in note for note in source.notes) and not whole.notes
    checkpoint, reference = source.transformer.checkpoint, whole.transformer.checkpoint
    assert isinstance(checkpoint, DequantisedCheckpoint)
    assert {n: i.shape for n, i in checkpoint.tensors.items()} == {n: i.shape for n, i in reference.tensors.items()}
    assert checkpoint.nbytes < reference.nbytes / 2
    assert source.fingerprint != whole.fingerprint
    for name, info in reference.tensors.items():
        target = torch.full(info.shape, torch.nan)
        checkpoint.read_into([(name, target)])
        assert torch.equal(target, reference.read(name)) and torch.equal(checkpoint.read(name), target)
    index = torch.tensor([[3, 0], [3, 5]])
    assert torch.equal(checkpoint.rows("proj_out.weight", index), reference.rows("proj_out.weight", index))
    assert checkpoint.bytes_read > checkpoint.nbytes
    with pytest.raises(CheckpointError, match="must have shape"):
        checkpoint.read_into([("proj_out.weight", torch.empty(3, 3))])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"img_in.weight._scale": None}, "must hold the tensor 'img_in.weight._scale'"),
        ({"img_in.weight._data": torch.zeros(64, 64, dtype=torch.uint8)}, r"must be qint8 or qfloat8 \(e4m3\), got U8"),
        ({"img_in.weight._data": None}, "must stand beside"),
        ({"img_in.weight._data": torch.zeros(64, 60, dtype=torch.int8)}, "img_in.weight|in_channels"),
        ({"txt_norm.weight": None}, "missing: txt_norm.weight"),
    ],
)
def test_a_quanto_file_that_is_not_whole_is_refused(change, said: str, tmp_path: Path) -> None:
    stored, _ = models(tmp_path, "int8")
    file = stored / "transformer" / FILE
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=said):
        open_model(stored)


def test_a_scale_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path) -> None:
    stored, _ = models(tmp_path, "int8")
    file = stored / "transformer" / FILE
    tensors = load_file(file)
    tensors["transformer_blocks.1.attn.to_q.weight._scale"][2] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"scale of 'transformer_blocks.1.attn.to_q.weight' must be finite"):
        latents(stored, tmp_path / "cache")


def test_shards_are_read_as_one_file_is(tmp_path: Path) -> None:
    stored, _ = models(tmp_path, "int8")
    file = stored / "transformer" / FILE
    tensors = load_file(file)
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, file.with_name(part))
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    one = DequantisedCheckpoint(Checkpoint.open([file]))
    several = DequantisedCheckpoint(Checkpoint.open([file.with_name("model.safetensors.index.json")]))
    for name in one.tensors:
        assert torch.equal(one.read(name), several.read(name))
