import errno
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qengine.errors import KernelError
from qengine.kernels import native
from qengine.kernels.read import default_threads, implementation, read_into, read_many, reference
from qengine.kernels.read import native as fast

SIZE = 100_003
IMPLEMENTATIONS = [
    pytest.param(reference.read_many, id="python"),
    pytest.param(
        fast.read_many,
        id="native",
        marks=pytest.mark.skipif(not fast.available(), reason=f"no native library: {native.reason()}"),
    ),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("read") / "data.bin"
    generator = torch.Generator().manual_seed(1)
    path.write_bytes(torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator).numpy().tobytes())
    return path


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
@pytest.mark.parametrize("threads", range(1, 9))
@settings(
    max_examples=8,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    places=st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, SIZE)), min_size=1, max_size=12),
    piece=st.integers(1000, 60_000),
)
def test_any_ranges_hold_exactly_the_bytes_of_the_file(read, threads, file, places, piece) -> None:
    data = file.read_bytes()
    wanted = [(offset, min(nbytes, SIZE - offset)) for offset, nbytes in places if offset < SIZE]
    buffer = torch.full((sum(nbytes for _, nbytes in wanted) + 2 * len(wanted),), 0xA5, dtype=torch.uint8)
    ranges, start = [], 0
    for offset, nbytes in wanted:
        ranges.append((offset, buffer[start + 1 : start + 1 + nbytes]))
        start += nbytes + 2
    read(file, ranges, threads, piece)
    expected = b"".join(b"\xa5" + data[offset : offset + nbytes] + b"\xa5" for offset, nbytes in wanted)
    assert buffer.numpy().tobytes() == expected


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_ends_inside_the_range_is_an_error_that_says_where(read, threads, file) -> None:
    target = torch.zeros(50_000, dtype=torch.uint8)
    with pytest.raises(OSError, match=f"ends at byte {SIZE}") as caught:
        read(file, [(0, torch.zeros(10, dtype=torch.uint8)), (SIZE - 20_000, target)], threads, 7_000)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(file)


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
def test_a_range_beyond_the_end_is_an_error(read, file) -> None:
    with pytest.raises(OSError, match="inside the range"):
        read(file, [(SIZE + 5, torch.zeros(1, dtype=torch.uint8))], 1, 1024)


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
def test_a_missing_file_is_file_not_found(read, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        read(tmp_path / "none.bin", [(0, torch.zeros(1, dtype=torch.uint8))], 1, 1024)


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
def test_a_folder_is_an_os_error(read, tmp_path) -> None:
    with pytest.raises(OSError):
        read(tmp_path, [(0, torch.zeros(1, dtype=torch.uint8))], 1, 1024)


@pytest.mark.parametrize("read", IMPLEMENTATIONS)
def test_a_file_name_that_is_not_ascii_is_read(read, tmp_path) -> None:
    path = tmp_path / "größe 模型.bin"
    path.write_bytes(b"abc")
    target = torch.zeros(3, dtype=torch.uint8)
    read(path, [(0, target)], 2, 1024)
    assert target.tolist() == [97, 98, 99]


def test_no_bytes_are_no_read(tmp_path) -> None:
    (tmp_path / "some.bin").write_bytes(b"")
    read_into(tmp_path / "some.bin", 0, torch.empty(0, dtype=torch.uint8))
    read_many(tmp_path / "some.bin", [])


def test_the_public_reader_uses_what_it_says(file, monkeypatch) -> None:
    used = []
    for module, name in ((fast, "native"), (reference, "python")):
        monkeypatch.setattr(module, "read_many", lambda *_, name=name: used.append(name))
    read_into(file, 0, torch.zeros(4, dtype=torch.uint8))
    assert used == [implementation()]
    monkeypatch.setattr(fast, "available", lambda: False)
    read_into(file, 0, torch.zeros(4, dtype=torch.uint8))
    assert used[1] == "python"


@pytest.mark.parametrize(
    ("tensor", "offset", "threads", "words"),
    [
        (torch.zeros(4), 0, 1, "must be uint8, got torch.float32"),
        (torch.zeros(8, dtype=torch.uint8)[::2], 0, 1, "contiguous"),
        (torch.zeros(2, 2, dtype=torch.uint8), 0, 1, "one contiguous dimension"),
        (torch.zeros(4, dtype=torch.uint8, device="meta"), 0, 1, "on the cpu, got meta"),
        (torch.zeros(4, dtype=torch.uint8), -1, 1, "offset must be at least 0, got -1"),
        (torch.zeros(4, dtype=torch.uint8), 0, 0, "threads must be 1 to 64, got 0"),
        (torch.zeros(4, dtype=torch.uint8), 0, 65, "threads must be 1 to 64, got 65"),
    ],
)
def test_wrong_arguments_are_kernel_errors(file, tensor, offset, threads, words) -> None:
    with pytest.raises(KernelError, match=words):
        read_into(file, offset, tensor, threads)


def test_the_default_number_of_threads_is_allowed() -> None:
    assert 2 <= default_threads() <= 8
