"""``qengine compare``: the figures on stdout, the picture of differences beside them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qengine.cli import main

PHOTO = Path(__file__).parents[1] / "photos" / "cat.jpg"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with Image.open(PHOTO) as photo:
        before = photo.convert("RGB").resize((160, 112))
    before.save("before.png")
    after = before.copy()
    after.paste((255, 0, 0), (0, 0, 80, 112))
    after.save("after.png")
    mask = np.zeros((112, 160), np.uint8)
    mask[:, :80] = 255
    Image.fromarray(mask).save("mask.png")
    clear = np.dstack([np.zeros((112, 160, 3), np.uint8), 255 - mask])
    Image.fromarray(clear, "RGBA").save("clear.png")
    return tmp_path


def run(*words: str) -> int:
    return main(["compare", *words])


def test_the_figures_outside_the_mask(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("before.png", "after.png", "--mask", "mask.png") == 0
    out = capsys.readouterr().out
    assert "50.0% of the picture" in out and "infinite, every pixel is the same" in out
    assert out.endswith("after_compared.png\n")
    with Image.open("after_compared.png") as made:
        assert made.size == (160, 112)


def test_a_name_that_was_not_given_is_a_free_one(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("before.png", "after.png") == 0 and run("before.png", "after.png") == 0
    assert capsys.readouterr().out.split()[-1] == "after_compared-1.png"


@pytest.mark.parametrize("mask", ["mask.png", "clear.png"])
def test_transparent_means_change_as_white_does(pictures: Path, capsys: pytest.CaptureFixture[str], mask: str) -> None:
    assert run("before.png", "after.png", "--mask", mask, "--json", "-o", "d.png") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["psnr_db"] is None and found["unchanged_share"] == 0.5 and found["picture"] == "d.png"
    assert run("before.png", "after.png", "--json", "-o", "d.png") == 0
    assert json.loads(capsys.readouterr().out)["psnr_db"] < 20


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("before.png", "none.png"), 3),
        (("before.png", "after.png", "--mask", "none.png"), 3),
        (("before.png", "after.png", "-o", "before.png"), 2),
        (("before.png", "after.png", "-o", "d.txt"), 2),
        (("before.png", "after.png", "-o", "none/d.png"), 3),
        (("before.png",), 2),
    ],
)
def test_wrong_usage_writes_nothing(pictures: Path, words: tuple[str, ...], code: int) -> None:
    before = {path: path.read_bytes() for path in pictures.iterdir()}
    assert run(*words) == code
    assert {path: path.read_bytes() for path in pictures.iterdir()} == before
