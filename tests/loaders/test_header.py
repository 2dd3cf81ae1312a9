import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qengine.errors import CheckpointError
from qengine.loaders.header import MAX_HEADER_BYTES, read_header
from safetensors.torch import load_file, save_file


def raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_every_tensor_is_where_the_header_says_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "scalar": torch.tensor(4.0, dtype=torch.float16),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    data = path.read_bytes()
    assert set(header.tensors) == set(tensors) and dict(header.metadata) == {"format": "pt"}
    for name, tensor in load_file(path).items():
        info = header.tensors[name]
        assert info.shape == tuple(tensor.shape)
        stored = data[info.offset : info.offset + info.nbytes]
        assert stored == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_header_of_100_megabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b"{")
        file.truncate(100_000_100)
    with pytest.raises(CheckpointError, match=f"at most {MAX_HEADER_BYTES} bytes, got 100000000"):
        read_header(path)


def test_a_header_length_of_two_to_the_63_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    with pytest.raises(CheckpointError, match="at most"):
        read_header(path)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.loaders.header.MAX_TENSORS", 1000)
    path = raw(tmp_path / "x.safetensors", {str(i): entry(0, 0) for i in range(1001)})
    with pytest.raises(CheckpointError, match="at most 1000, got 1001"):
        read_header(path)


def test_a_missing_file_a_folder_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "empty.safetensors"):
        with pytest.raises(CheckpointError, match="must be"):
            read_header(path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_header(path)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.randn(4), "b": torch.randn(6)}, whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read_header(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match=f"must be {len(data)} bytes, got {len(data) + 1}: bytes are left over"):
        read_header(cut)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "overlaps"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, b"123456", "gap"),
        ({"a": entry(1, 4)}, b"1234", "gap"),
        ({"a": entry(0, 400)}, b"1234", "truncated"),
        ({"a": entry(0, 1 << 62)}, b"1234", "truncated"),
        ({"a": entry(0, 4, "F32", [2])}, b"1234", "must have 8 bytes, got 4"),
        ({"a": entry(0, 4, "F32", [1 << 62, 1 << 62])}, b"1234", "must have"),
        ({"a": entry(0, 4, "F4", [1])}, b"1234", "dtype"),
        ({"a": entry(0, 4, "U8", [-4])}, b"1234", "shape"),
        ({"a": entry(0, 4, "U8", [True, 4])}, b"1234", "shape"),
        ({"a": entry(0, 4, "U8", [1] * 8 + [4])}, b"1234", "shape"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}}, b"1234", "data_offsets"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, b"1234", "data_offsets"),
        ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "must have dtype, shape and data_offsets"),
        ({"a": [1, 2]}, b"", "must have dtype"),
        ({"__metadata__": {"a": 1}}, b"", "strings"),
        (b"[]", b"", "must begin with"),
        (b"{", b"", "JSON"),
        (b'{"a": NaN}', b"", "NaN"),
        (b'{"\xff": 1}', b"", "JSON"),
        (b'{"a":' * 100_000, b"", "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "JSON"),
    ],
)
def test_an_altered_header_is_refused(tmp_path: Path, header: Any, data: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_header(raw(tmp_path / "x.safetensors", header, data))


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    one = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    with pytest.raises(CheckpointError, match="'a' twice"):
        read_header(raw(tmp_path / "x.safetensors", f"{{{one},{one}}}".encode()))


def strange(chance: random.Random) -> Any:
    return chance.choice([0, 1, 2, 4, 8, chance.randint(-2, 40), 1 << 70, True, None, 0.5, "x", [], {}])


def strange_list(chance: random.Random) -> Any:
    return [strange(chance) for _ in range(chance.randint(0, 3))] if chance.random() < 0.9 else strange(chance)


def strange_header(chance: random.Random) -> dict[str, Any]:
    """Tensors that are mostly right, one after the other, with faults strewn in."""
    header, start = {}, 0
    for name in chance.sample(["a", "b", "c", "__metadata__"], chance.randint(0, 4)):
        dtype, shape = chance.choice([("U8", 1), ("BF16", 2), ("F32", 4)]), [chance.randint(0, 3)]
        found = entry(start, start + shape[0] * dtype[1], dtype[0], shape)
        start = found["data_offsets"][1]
        faults = {
            "dtype": lambda: chance.choice(["X", 3, "F64", None]),
            "shape": lambda: strange_list(chance),
            "data_offsets": lambda: strange_list(chance),
            "more": lambda: strange(chance),
        }
        if chance.random() < 0.3:
            fault = chance.choice(list(faults))
            found[fault] = faults[fault]()
        header[name] = strange(chance) if chance.random() < 0.1 else found
    return header


@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_header_is_read_within_the_file_or_refused(tmp_path_factory: Any, seed: int) -> None:
    chance = random.Random(seed)
    data = bytes(chance.randint(0, 24))
    _check(raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", strange_header(chance), data))


def test_a_file_with_flipped_bytes_is_read_within_the_file_or_refused(tmp_path: Path) -> None:
    good = {"__metadata__": {"format": "pt"}, "a": entry(0, 8, "F32", [2]), "b": entry(8, 12, "BF16", [1, 2])}
    path = raw(tmp_path / "flip.safetensors", good, bytes(12))
    whole = path.read_bytes()
    chance = random.Random(0)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        _check(path)


def _check(path: Path) -> None:
    try:
        header = read_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(0 < info.offset <= info.offset + info.nbytes <= size for info in header.tensors.values())
    assert sum(info.nbytes for info in header.tensors.values()) < size
