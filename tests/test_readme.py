"""What the README says is what happens."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from qengine.bench.readme import render

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_recorded_results() -> None:
    assert render(README) == README


def test_the_photo_of_the_first_command_is_in_the_repository() -> None:
    photo = re.search(r"qengine edit (\S+) ", README)
    assert photo and (ROOT / photo[1]).is_file()


def test_the_python_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    shutil.copy(ROOT / "tests" / "photos" / "cat.jpg", "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    scope: dict = {}
    exec(compile(blocks[0], "README.md", "exec"), scope)
    with Image.open("gray.png") as made:
        assert made.size == scope["event"].image.size


def test_the_backend_example_serves_a_diffusers_style_caller(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 14
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    seen = []

    def on_step(pipe, index, timestep, tensors):
        seen.append((index, tensors["latents"].shape))
        return {}

    pipe = scope["QEngineBackend"]()
    with Image.open(ROOT / "tests" / "photos" / "cat.jpg") as opened:
        photo = opened.resize((128, 128))
    options = {"num_inference_steps": 3, "size": (64, 64)}
    image = pipe(photo, "make it grayscale", callback_on_step_end=on_step, **options).images[0]
    assert image.size == (64, 64) and [index for index, _ in seen] == [0, 1, 2]
    pixels = np.asarray(image, dtype=int)
    assert np.abs(pixels.max(axis=2) - pixels.min(axis=2)).mean() < 12  # gray: the channels agree
