"""Checkpoints in optimum-quanto's names."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch
from qengine.errors import CheckpointError, KernelError, OutputError
from qengine.kernels.quant import quantise_rows
from qengine.loaders import quanto
from qengine.loaders.checkpoint import Checkpoint
from safetensors.torch import load_file, save_file

QTYPES = {"int8": "qint8", "fp8": "qfloat8_e4m3fn"}
FORMATS = sorted(QTYPES)


def layers(weight_format: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    shapes = {"blocks.0.attn.to_q.weight": (19, 36), "blocks.0.mlp.weight": (5, 423), "one.weight": (1, 8)}
    return {n: quantise_rows(torch.randn(s), weight_format, 1, scale_dtype=dtype) for n, s in shapes.items()}


def write(path: Path, weight_format: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    rows = layers(weight_format)
    plain = {"blocks.0.attn.to_q.bias": torch.randn(19).bfloat16(), "norm.weight": torch.randn(36).bfloat16()}
    quanto.write_quanto(path, ((name, *pair) for name, pair in rows.items()), plain)
    return rows


def spoiled(tmp_path: Path, weight_format: str, change) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    write(path, weight_format)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return Checkpoint.open([path])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path, weight_format: str) -> None:
    rows = write(tmp_path / "new" / "model.safetensors", weight_format)
    checkpoint = Checkpoint.open([tmp_path / "new" / "model.safetensors"])
    assert quanto.detect_quanto(checkpoint) == weight_format
    assert quanto.logical_shapes(checkpoint) == {
        "blocks.0.attn.to_q.weight": (19, 36),
        "blocks.0.attn.to_q.bias": (19,),
        "blocks.0.mlp.weight": (5, 423),
        "norm.weight": (36,),
        "one.weight": (1, 8),
    }
    for name, (stored, scale) in rows.items():
        found, found_scale = quanto.read_rows(checkpoint, name)
        assert torch.equal(found.view(torch.uint8), stored.view(torch.uint8)) and found.dtype == stored.dtype
        assert found_scale.dtype == torch.float32 and torch.equal(found_scale, scale.float())
        value = stored.float() * scale.float()[:, None]
        assert torch.equal(quanto.dequantise(checkpoint, name, torch.float32), value)
        assert torch.equal(quanto.dequantise(checkpoint, name), value.bfloat16())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_file_has_the_librarys_names_shapes_and_map(tmp_path: Path, weight_format: str) -> None:
    write(tmp_path / "model.safetensors", weight_format)
    tensors = load_file(tmp_path / "model.safetensors")
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if name.startswith("blocks.0.attn.")}
    stored = torch.int8 if weight_format == "int8" else torch.float8_e4m3fn
    assert found == {
        "blocks.0.attn.to_q.weight._data": ((19, 36), stored),
        "blocks.0.attn.to_q.weight._scale": ((19, 1), torch.bfloat16),
        "blocks.0.attn.to_q.bias": ((19,), torch.bfloat16),
        "blocks.0.attn.to_q.input_scale": ((), torch.bfloat16),
        "blocks.0.attn.to_q.output_scale": ((), torch.bfloat16),
    }
    assert tensors["one.weight._scale"].shape == () and tensors["blocks.0.mlp.input_scale"] == 1
    entry = {"weights": QTYPES[weight_format], "activations": "none"}
    expected = dict.fromkeys(["blocks.0.attn.to_q", "blocks.0.mlp", "one"], entry)
    assert json.loads((tmp_path / "quanto_qmap.json").read_text()) == expected
    metadata = Checkpoint.open([tmp_path / "model.safetensors"]).metadata
    assert metadata["quantization_format"] == "quanto"
    assert json.loads(base64.b64decode(metadata["quantization_map_base64"])) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "quanto_qmap.json"]


def test_convolutions_and_scales_for_the_whole_tensor_are_read(tmp_path: Path) -> None:
    conv = torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8)
    scale = torch.rand(6, 1, 1, 1)
    save_file(
        {
            "c.weight._data": conv,
            "c.weight._scale": scale,
            "d.weight._data": conv.clone(),
            "d.weight._scale": torch.tensor(0.5),
        },
        tmp_path / "x.safetensors",
    )
    checkpoint = Checkpoint.open([tmp_path / "x.safetensors"])
    assert quanto.detect_quanto(checkpoint) == "int8"
    assert torch.equal(quanto.dequantise(checkpoint, "c.weight"), conv * scale)
    assert torch.equal(quanto.dequantise(checkpoint, "d.weight"), conv * 0.5)
    assert quanto.read_rows(checkpoint, "d.weight")[1].tolist() == [0.5] * 6


def test_views_of_one_slab_can_be_written(tmp_path: Path) -> None:
    slab = torch.zeros(4096, dtype=torch.uint8)
    stored, scale, bias = slab[:64].view(torch.int8).view(8, 8), slab[256:288].view(torch.float32), slab[512:528]
    stored.fill_(3)
    scale.fill_(2)
    quanto.write_quanto(tmp_path / "x.safetensors", [("a.weight", stored, scale)], {"a.bias": bias, "tied": bias})
    checkpoint = Checkpoint.open([tmp_path / "x.safetensors"])
    assert (quanto.dequantise(checkpoint, "a.weight") == 6).all() and checkpoint.nbytes < 200


def test_other_checkpoints_are_not_taken_for_quanto(tmp_path: Path) -> None:
    save_file({"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open([tmp_path / "x.safetensors"])
    assert quanto.detect_quanto(checkpoint) is None
    with pytest.raises(CheckpointError, match="must hold the tensor 'a.weight._data'"):
        quanto.read_rows(checkpoint, "a.weight")


ROWS = "blocks.0.mlp.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({ROWS + "._data": t[ROWS + "._data"].view(torch.uint8)}), "qint8 or qfloat8 .* got U8"),
        (lambda t: t.update({ROWS + "._data": t[ROWS + "._data"].float().to(torch.float8_e5m2)}), "got F8_E5M2"),
        (
            lambda t: t.update({ROWS + "._data": t[ROWS + "._data"].float().to(torch.float8_e4m3fn)}),
            "one kind, got fp8 and int8",
        ),
        (lambda t: t.pop(ROWS + "._scale"), "must hold the tensor 'blocks.0.mlp.weight._scale'"),
        (lambda t: t.pop(ROWS + "._data"), "'blocks.0.mlp.weight._scale' must stand beside"),
        (
            lambda t: t.update({ROWS + "._scale": torch.ones(5, 3)}),
            r"per row of \[5, 423\], got shape \[5, 3\]",
        ),
        (lambda t: t.update({ROWS + "._data": torch.ones(5).char()}), "one number per row"),
    ],
)
def test_headers_that_are_not_8_bit_rows_are_refused(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        quanto.detect_quanto(spoiled(tmp_path, "int8", change))


def test_scales_and_rows_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    checkpoint = spoiled(tmp_path, "fp8", lambda t: t[ROWS + "._scale"][2].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="scale of 'blocks.0.mlp.weight' must be finite"):
        quanto.dequantise(checkpoint, ROWS)
    checkpoint = spoiled(tmp_path, "fp8", lambda t: t[ROWS + "._data"].view(torch.uint8)[2, 7].fill_(255))
    with pytest.raises(CheckpointError, match="rows of 'blocks.0.mlp.weight' must be finite, got NaN"):
        quanto.dequantise(checkpoint, ROWS)


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, fault: str) -> None:
    path = tmp_path / "model.safetensors"
    write(path, "int8")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quanto.os, fault, full)
    with pytest.raises(OutputError, match="must be writable, got: No space left"):
        write(path, "fp8")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("entries", "plain", "error", "message"),
    [
        ([("a", *layers("int8")["one.weight"])], {}, CheckpointError, "must be named 'layer.weight', got 'a'"),
        ([("a.weight", *layers("int8")["one.weight"])] * 2, {}, CheckpointError, "given once"),
        ([("a.weight", *layers("int8")["one.weight"])], {"a.weight": torch.ones(1)}, CheckpointError, "given once"),
        ([("a.weight", torch.ones(2, 2), torch.ones(2))], {}, KernelError, "weight must be a matrix of"),
        ([("a.weight", torch.ones(2, 2).char(), torch.ones(2, 1))], {}, KernelError, "scale must be"),
    ],
)
def test_tensors_that_make_no_quanto_file_are_refused(tmp_path: Path, entries, plain, error, message: str) -> None:
    with pytest.raises(error, match=message):
        quanto.write_quanto(tmp_path / "x.safetensors", entries, plain)
    assert not list(tmp_path.iterdir())
