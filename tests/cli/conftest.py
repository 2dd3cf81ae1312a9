"""A folder to work in with a photo, a fake engine, and the command line as a function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from qengine.cli import backend, main

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine, replacements  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with photo.png in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 20), (200, 10, 10)).save("photo.png")
    Image.new("RGB", (20, 40), (10, 200, 10)).save("other.png")
    return tmp_path


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeEngine:
    """The fake engine in place of the real one."""
    fake = FakeEngine()
    for name, value in replacements(fake).items():
        monkeypatch.setattr(backend, name, value)
    return fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
