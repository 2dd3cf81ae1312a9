"""The native library under the address and undefined-behaviour sanitisers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from qengine.kernels import native

ROOT = Path(native.__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_entry_point_stays_inside_its_buffers(tmp_path: Path) -> None:
    compiler, cmake = shutil.which("g++") or shutil.which("clang++"), shutil.which("cmake")
    if compiler is None or cmake is None:
        pytest.skip("needs CMake and g++ or clang++")
    options = [f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS=-O1"]
    options.append("-DQENGINE_SANITISE=address;undefined")
    subprocess.run([cmake, "-S", str(ROOT), "-B", str(tmp_path), *options], check=True, capture_output=True)
    built = subprocess.run(
        [cmake, "--build", str(tmp_path), "--target", "qengine_exercise"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    done = subprocess.run([str(tmp_path / "qengine_exercise"), str(tmp_path / "file")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"calls, ABI {native.ABI_VERSION}\n") and not done.stderr
