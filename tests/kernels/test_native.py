import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from qengine.kernels import native

ROOT = Path(native.__file__).resolve().parents[1]


def build(folder: Path, source: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "x.cpp").write_text(source)
    library = folder / f"lib{abs(hash(source))}.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "x.cpp")], check=True)
    return library


def test_the_library_is_loaded_or_there_is_a_reason() -> None:
    assert (native.library() is None) is bool(native.reason())


def test_a_library_of_another_abi_version_is_not_used(tmp_path: Path) -> None:
    path = build(tmp_path, 'extern "C" unsigned qengine_abi_version() { return 99; }')
    status = native.load(path)
    assert status.library is None and f"must have ABI version {native.ABI_VERSION}, got 99" in status.reason


def test_a_library_without_a_version_and_a_file_that_is_none_are_not_used(tmp_path: Path) -> None:
    assert "has no qengine_abi_version" in native.load(build(tmp_path, "int other() { return 1; }")).reason
    (tmp_path / "bad.so").write_bytes(b"no library")
    assert "cannot be loaded" in native.load(tmp_path / "bad.so").reason


def test_the_library_can_be_switched_off() -> None:
    code = "from qengine.kernels import native, read; print(native.reason(), '|', read.implementation())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "QENGINE_NO_NATIVE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "QENGINE_NO_NATIVE is set | python"


def test_the_version_in_the_header_is_the_version_that_is_asked_for() -> None:
    text = (ROOT / "kernels" / "src" / "qengine.h").read_text("utf-8")
    assert f"#define QENGINE_ABI_VERSION {native.ABI_VERSION}u" in text


@pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")
def test_the_native_reader_refuses_bad_arguments_with_einval(tmp_path: Path) -> None:
    library = native.library()
    assert library is not None
    stopped = ctypes.c_uint64()
    entry = library["qengine_read"]
    entry.restype = ctypes.c_int
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    name, where, size = os.fsencode(path), ctypes.byref(stopped), ctypes.c_size_t
    einval = 22
    assert entry(None, None, size(0), 1, size(1), where) == einval
    assert entry(name, None, size(1), 1, size(1), where) == einval
    assert entry(name, None, size(0), 0, size(1), where) == einval
    assert entry(name, None, size(0), 65, size(1), where) == einval
    assert entry(name, None, size(0), 1, size(0), where) == einval
    bad_target = (ctypes.c_uint64 * 3)(0, 4, 0)
    past_the_end = (ctypes.c_uint64 * 3)(1 << 63, 4, ctypes.addressof(stopped))
    for ranges in (bad_target, past_the_end):
        assert entry(name, ranges, size(1), 1, size(1), where) == einval


@pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")
def test_the_best_instruction_set_is_one_that_is_here_and_plain_always_is() -> None:
    here = [name for name in native.ISAS[1:] if native.isa(name) == name]
    assert here[0] == "plain" and native.isa() == here[-1]


def test_a_library_that_lacks_a_function_of_its_version_is_not_used(tmp_path: Path) -> None:
    source = f'extern "C" unsigned qengine_abi_version() {{ return {native.ABI_VERSION}; }}'
    assert native.load(build(tmp_path, source)).reason.endswith("has no qengine_isa")
