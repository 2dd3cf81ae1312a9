import json
from pathlib import Path

import pytest
import torch
from qengine.errors import CheckpointError
from qengine.loaders import checkpoint as module
from qengine.loaders.checkpoint import Checkpoint
from safetensors.torch import save_file

TENSORS = {
    "a.weight": torch.randn(5, 8),
    "a.bias": torch.randn(5).to(torch.bfloat16),
    "b": torch.randn(3, 2, 4).to(torch.float16),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    return path


def sharded(folder: Path, index: bool = True) -> Path:
    folder.mkdir()
    names = list(TENSORS)
    files = [f"m-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: TENSORS[name] for name in names[:2]}, folder / files[0])
    save_file({name: TENSORS[name] for name in names[2:]}, folder / files[1])
    if not index:
        return folder / files[0]
    weight_map = {name: files[place >= 2] for place, name in enumerate(names)}
    path = folder / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_tensors_are_read_as_stored_and_cast_when_asked(stored: Path) -> None:
    found = Checkpoint.open([stored])
    assert found.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert torch.equal(found.read(name), tensor) and found.read(name).dtype == tensor.dtype
        assert torch.equal(found.read(name, torch.float64), tensor.to(torch.float64))


def test_many_tensors_are_read_into_given_places_of_any_dtype_and_layout(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STAGING_BYTES", 64)
    slab = torch.full((4, 64), float("nan"))
    targets = {
        "a.weight": torch.full((8, 5), float("nan")).t(),
        "a.bias": slab[1, 3:8],
        "b": torch.full((3, 2, 4), float("nan"), dtype=torch.float16),
        "scalar": torch.tensor(float("nan"), dtype=torch.bfloat16),
    }
    Checkpoint.open([stored]).read_into(list(targets.items()))
    for name, target in targets.items():
        assert torch.equal(target, TENSORS[name].to(target.dtype))
    assert slab[1, :3].isnan().all() and slab[1, 8:].isnan().all()


def test_rows_of_a_matrix_are_gathered_from_the_file(stored: Path) -> None:
    found = Checkpoint.open([stored])
    for indices in (torch.tensor([4, 0, 4, 2]), torch.tensor([[1], [3]]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(found.rows("a.weight", indices), TENSORS["a.weight"][indices])
    for bad in (torch.tensor([5]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="row must be 0 to 4"):
            found.rows("a.weight", bad)
    with pytest.raises(CheckpointError, match="must be a matrix"):
        found.rows("b", torch.tensor([0]))


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_one_checkpoint(tmp_path: Path, stored: Path, index: bool) -> None:
    found = Checkpoint.open([sharded(tmp_path / "s", index)])
    assert len(found.paths) == 2
    assert all(torch.equal(found.read(name), tensor) for name, tensor in TENSORS.items())
    assert found.fingerprint == Checkpoint.open([stored]).fingerprint


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, index: bool) -> None:
    path = sharded(tmp_path / "s", index)
    (path.parent / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002"):
        Checkpoint.open([path])


def test_shards_that_differ_from_their_index_are_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path / "s")
    document = json.loads(path.read_text())
    document["weight_map"]["ghost"] = "m-00001-of-00002.safetensors"
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="what the index lists, got 1 differences: ghost"):
        Checkpoint.open([path])


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", "m.bin", 3])
def test_an_index_may_only_name_safetensors_files_beside_it(tmp_path: Path, name: object) -> None:
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="safetensors files beside it"):
        Checkpoint.open([path])


def test_missing_unexpected_and_wrongly_shaped_tensors_are_listed(stored: Path) -> None:
    found = Checkpoint.open([stored])
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    found.require(shapes, "thing")
    with pytest.raises(CheckpointError) as caught:
        found.require({"a.weight": (5, 9), "a.bias": (5,), **{f"m{i}": (1,) for i in range(12)}}, "thing")
    words = caught.value.message
    assert "12 missing: m0, m1" in words and "m9 and 2 more" in words and "m10" not in words
    assert "3 unexpected: " in words and "a.weight [5, 8] instead of [5, 9]" in words
    assert caught.value.exit_code == 4
    found.require({"a.weight": (5, 8), "gone": (1,)}, "thing", ignore=("a.", "b", "empty", "scalar", "gone"))


def test_tensors_are_renamed_or_dropped_and_two_of_one_name_are_refused(stored: Path) -> None:
    found = Checkpoint.open([stored], lambda name: None if name == "b" else f"x.{name}")
    assert "x.a.bias" in found.tensors and found.dropped == {"b"}
    assert torch.equal(found.read("x.a.bias"), TENSORS["a.bias"])
    with pytest.raises(CheckpointError, match="must be stored once"):
        Checkpoint.open([stored], lambda name: "same")


def test_a_wrong_target_shape_an_unknown_name_and_no_file_are_refused(stored: Path) -> None:
    found = Checkpoint.open([stored])
    with pytest.raises(CheckpointError, match=r"must have shape \[5\], got \[5, 8\]"):
        found.read_into([("a.weight", torch.empty(5))])
    with pytest.raises(CheckpointError, match="none of this name"):
        found.read("nothing")
    with pytest.raises(CheckpointError, match="at least one file"):
        Checkpoint.open([])


def test_a_file_cut_after_it_was_opened_is_an_error_not_garbage(stored: Path) -> None:
    found = Checkpoint.open([stored])
    with stored.open("r+b") as file:
        file.truncate(stored.stat().st_size - 40)
    with pytest.raises(CheckpointError, match="as its header says"):
        found.read_into([(name, torch.empty_like(tensor)) for name, tensor in TENSORS.items()])


def test_the_fingerprint_sees_data_and_shapes_but_no_path(tmp_path: Path, stored: Path) -> None:
    base = Checkpoint.open([stored]).fingerprint
    for name, change in (
        ("same", TENSORS),
        ("data", TENSORS | {"scalar": torch.tensor(2.0)}),
        ("shape", TENSORS | {"b": TENSORS["b"].view(6, 4)}),
        ("name", {f"_{name}": tensor for name, tensor in TENSORS.items()}),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(change, path)
        assert (Checkpoint.open([path]).fingerprint == base) is (name == "same")


def test_a_tensor_larger_than_the_staging_is_cast_in_pieces(tmp_path, monkeypatch) -> None:
    from qengine.loaders import checkpoint as module

    monkeypatch.setattr(module, "STAGING_BYTES", 64)
    stored = {"a": torch.randn(7, 11).bfloat16(), "b": torch.randn(3).bfloat16(), "c": torch.randn(6, 20).bfloat16()}
    save_file(stored, tmp_path / "m.safetensors")
    checkpoint = module.Checkpoint.open([tmp_path / "m.safetensors"])
    targets = {name: torch.full(tensor.shape, torch.nan) for name, tensor in stored.items()}
    targets["c"] = torch.full((20, 6), torch.nan).t()
    checkpoint.read_into(list(targets.items()))
    for name, tensor in stored.items():
        assert torch.equal(targets[name], tensor.float()) and torch.equal(
            checkpoint.read(name, torch.float32), targets[name]
        )
    assert checkpoint.bytes_read == 2 * checkpoint.nbytes
