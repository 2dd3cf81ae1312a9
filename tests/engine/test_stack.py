"""Stacks of blocks: their slabs from the checkpoint and from packed files, and files that are not what they claim."""

from __future__ import annotations

import json
import shutil
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from qengine.engine.mover import Placement
from qengine.engine.quant import dequantise_weight
from qengine.engine.stack import BlockStack, CheckpointSource, Hold, PackedSource, open_tape, pack, packed_bytes
from qengine.errors import CheckpointError, OutputError
from qengine.loaders.checkpoint import Checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

CPU = torch.device("cpu")
COUNT, DIM = 3, 64


def _save(path: Path, seed: int = 0, **changed: torch.Tensor) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index in range(COUNT):
        for layer, (rows, columns) in (("0", (2 * DIM, DIM)), ("2", (DIM, 2 * DIM))):
            tensors[f"b.{index}.{layer}.weight"] = torch.randn(rows, columns, generator=generator).bfloat16()
            tensors[f"b.{index}.{layer}.bias"] = torch.randn(rows, generator=generator).bfloat16()
    save_file(tensors | changed, path)
    return Checkpoint.open([path])


def _stack(checkpoint: Checkpoint, weight_format: str, **options) -> BlockStack:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
    return BlockStack(checkpoint, "b.", COUNT, module, weight_format=weight_format, dtype=torch.float32, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return _save(tmp_path / "model.safetensors")


def _run(stack: BlockStack, hold: Hold, cache: Path | None, x: torch.Tensor) -> torch.Tensor:
    with open_tape(stack, hold, CPU, cache) as tape:
        for more in (True, False):
            for _, views in tape.sweep(more):
                x = stack.template.bind(views)(x)
    return x


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
def test_X01_bits_do_not_depend_on_where_the_slabs_lie(checkpoint, weight_format, tmp_path) -> None:
    x = torch.randn(5, DIM)
    resident = _run(_stack(checkpoint, weight_format), Hold(weight_format), tmp_path, x)
    for host in ("arena", "disk", "mapped"):
        for streamed in ((0,), (0, 2), (0, 1, 2)):
            hold = Hold(weight_format, Placement(COUNT, streamed, slots=2, host=host))
            assert torch.equal(_run(_stack(checkpoint, weight_format), hold, tmp_path, x), resident), hold


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_a_packed_file_holds_every_tensor_under_its_name(checkpoint, weight_format, tmp_path) -> None:
    path = tmp_path / "packed.safetensors"
    stack = _stack(checkpoint, weight_format, dead=("2.bias",))
    seen: list[tuple[int, int]] = []
    pack(stack, path, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (stack.nbytes, stack.nbytes) and len(seen) == COUNT
    assert path.stat().st_size == packed_bytes(stack)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert {f"b.{COUNT - 1}.2.scale", "b.0.2.bias"} <= names and f"b.{COUNT - 1}.2.bias" not in names
        stored, scale = file.get_tensor("b.1.0.weight"), file.get_tensor("b.1.0.scale")
    original = checkpoint.read("b.1.0.weight").float()
    error = (dequantise_weight(stored, scale) - original).norm() / original.norm()
    assert error < (0.01 if weight_format == "int8" else 0.03)


def test_slabs_begin_at_pages_so_that_the_file_can_be_mapped(checkpoint, tmp_path) -> None:
    stack = _stack(checkpoint, "int8")
    pack(stack, tmp_path / "p.safetensors")
    source = PackedSource(tmp_path / "p.safetensors", stack)
    for index in range(COUNT):
        into = torch.empty(stack.layouts[index].nbytes, dtype=torch.uint8)
        source.read(index, into)
        assert source.view(index).data_ptr() % 4096 == 0 and torch.equal(source.view(index), into)


def test_a_matrix_that_is_kept_stays_in_the_compute_dtype(checkpoint, tmp_path) -> None:
    stack = _stack(checkpoint, "int8", keep=("2.weight",))
    with open_tape(stack, Hold("int8"), CPU, tmp_path) as tape:
        views = dict(tape.sweep(False))[0]
        assert views["0.weight"].dtype == torch.int8
        assert torch.equal(views["2.weight"], checkpoint.read("b.0.2.weight").float())


def test_a_second_opening_reads_the_packed_file_alone(checkpoint, tmp_path) -> None:
    x = torch.randn(2, DIM)
    first = _run(_stack(checkpoint, "int8"), Hold("int8"), tmp_path, x)
    read = checkpoint.bytes_read
    assert torch.equal(_run(_stack(checkpoint, "int8"), Hold("int8"), tmp_path, x), first)
    assert checkpoint.bytes_read == read


def _damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "altered":
        path.write_bytes(data[:-9000] + bytes(200) + data[-8800:])
    elif how == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        header["__metadata__"][how] = "other"
        text = json.dumps(header).encode().ljust(length)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "how", ["truncated", "altered", "foreign", "empty", "qengine.format", "qengine.source", "qengine.slabs"]
)
def test_a_damaged_packed_file_is_refused_and_left_as_it_is(checkpoint, how, tmp_path) -> None:
    stack = _stack(checkpoint, "int8")
    path = tmp_path / "packed.safetensors"
    pack(stack, path)
    _damage(path, how)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"(?s)packed\.safetensors.*hint"):
        _run(_stack(checkpoint, "int8"), Hold("int8", packed=path), None, torch.randn(1, DIM))
    assert path.read_bytes() == before


def test_a_source_that_changed_since_packing_is_noticed(checkpoint, tmp_path) -> None:
    path = tmp_path / "packed.safetensors"
    pack(_stack(checkpoint, "int8"), path)
    changed = _save(tmp_path / "model.safetensors", seed=1)
    with pytest.raises(CheckpointError, match="another state"):
        PackedSource(path, _stack(changed, "int8"))


@pytest.mark.parametrize("name", ["b.1.0.weight", "b.1.0.bias"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(name, tmp_path) -> None:
    shape = (2 * DIM, DIM) if name.endswith("weight") else (2 * DIM,)
    bad = torch.zeros(shape).bfloat16()
    bad.view(-1)[7] = torch.nan
    checkpoint = _save(tmp_path / "model.safetensors", **{name: bad})
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"the old file")
    with pytest.raises(CheckpointError, match=rf"{name} must be .*nan|{name} must be finite"):
        pack(_stack(checkpoint, "int8"), path)
    assert path.read_bytes() == b"the old file" and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 5))
    with pytest.raises(OutputError, match="free for the packed file"):
        pack(_stack(checkpoint, "int8"), tmp_path / "new" / "packed.safetensors")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_on_the_way_leaves_the_old_file(checkpoint, tmp_path) -> None:
    path = tmp_path / "packed.safetensors"
    path.write_bytes(b"the old file")

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        pack(_stack(checkpoint, "int8"), path, full)
    assert path.read_bytes() == b"the old file" and len(list(tmp_path.iterdir())) == 2


def test_slabs_read_from_the_checkpoint_are_its_tensors(checkpoint) -> None:
    stack = _stack(checkpoint, "bf16")
    into = torch.empty(stack.layouts[2].nbytes, dtype=torch.uint8)
    CheckpointSource(stack).read(2, into)
    for name, view in stack.layouts[2].views(into).items():
        assert torch.equal(view, checkpoint.read(f"b.2.{name}").float())
