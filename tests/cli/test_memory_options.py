"""Memory options from the command line to the picture, with the model inside qengine; rerun gives the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qengine.engine.metadata import read_metadata, write_picture

EDIT = ["edit", "photo.png", "make it grayscale", "--size", "64x48", "--steps", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(folder / "cache"))
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save("photo.png")


def pixels(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


def numerics(name: str) -> dict[str, str]:
    return read_metadata(Path(name))["numerics"]


@pytest.mark.parametrize(
    "words",
    [
        ["--vram", "200MiB"],
        ["--blocks-to-swap", "3"],
        ["--blocks_to_swap", "3", "--vram", "1GiB", "--ram", "8GiB"],
        ["--offload", "sequential"],
        ["--text-encoder-cpu"],
    ],
)
def test_E14_where_weights_lie_changes_no_bit(run, words: list[str]) -> None:
    assert run(*EDIT, "-o", "plain.png")[0] == 0
    code, out, err = run(*EDIT, *words, "-o", "out.png")
    assert (code, out) == (0, "out.png\n"), err
    assert (pixels("out.png") == pixels("plain.png")).all()
    assert numerics("out.png") == numerics("plain.png")


def test_M23_fp8_base_is_another_word_for_scaled_fp8(run) -> None:
    for flag in ("--fp8_base", "--fp8_scaled"):
        assert run(*EDIT, flag, "-o", f"{flag[2:]}.png")[0] == 0
    assert numerics("fp8_base.png")["weights"] == "fp8"
    assert (pixels("fp8_base.png") == pixels("fp8_scaled.png")).all()


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (["--weights", "int8"], {"weights": "int8", "text_encoder_weights": "int8"}),
        (["--fp8_scaled", "--text-encoder-weights", "bf16"], {"weights": "fp8", "text_encoder_weights": "bf16"}),
        (["--fp8_vl"], {"weights": "bf16", "text_encoder_weights": "fp8"}),
        (["--vae-tile", "16"], {"vae_tile": "16"}),
        (["--vae-weights", "int8"], {"vae_weights": "int8"}),
    ],
)
def test_X04_rerun_takes_up_the_choices_that_decide_bits(run, monkeypatch, words: list[str], recorded) -> None:
    assert run(*EDIT, "-o", "plain.png")[0] == 0
    code, _, err = run(*EDIT, *words, "-o", "out.png")
    assert code == 0, err
    assert recorded.items() <= numerics("out.png").items() and numerics("out.png") != numerics("plain.png")
    monkeypatch.setenv("QENGINE_CACHE", str(Path("another cache").resolve()))
    code, _, err = run("rerun", "out.png", "--blocks-to-swap", "2", "--vram", "1GiB")
    assert code == 0, err
    assert (pixels("out_rerun.png") == pixels("out.png")).all()
    assert numerics("out_rerun.png") == numerics("out.png")


def test_a_format_changes_bits_so_rerun_would_notice_a_forgotten_one(run) -> None:
    assert run(*EDIT, "-o", "plain.png")[0] == 0
    assert run(*EDIT, "--weights", "int8", "-o", "out.png")[0] == 0
    assert (pixels("out.png") != pixels("plain.png")).any()
    assert run("rerun", "out.png", "--weights", "bf16", "--text-encoder-weights", "bf16")[0] == 0
    assert (pixels("out_rerun.png") == pixels("plain.png")).all()


def test_first_use_packs_and_says_so_and_a_second_run_does_not(run) -> None:
    _, _, err = run(*EDIT, "--weights", "int8", "-o", "a.png")
    assert [line.split()[0] for line in err.splitlines() if not line.startswith("note")] == (
        ["model", "open", "pack", "encode", "pack", "denoise", "denoise", "decode", "done"]
    )
    assert len(list(Path("cache/packed").iterdir())) == 2
    _, _, err = run(*EDIT, "--weights", "int8", "-o", "b.png")
    assert "pack " not in err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "expected", "said"),
    [
        (["--blocks-to-swap", "300"], 2, "blocks_to_swap must be from 0 to 4, got 300"),
        (["--blocks-to-swap", "-1"], 2, "blocks_to_swap must be a whole number from 0, got -1"),
        (["--vram", "1MiB"], 5, "hint: this fits with the least: qengine edit"),
        (["--ram", "1MiB"], 5, "--ram must be at least"),
        (["--vae-tile", "0"], 2, "vae_tile must be a whole number from 1, got 0"),
        (["--packed", "gone.safetensors"], 4, "gone.safetensors must"),
        (["--packed", "photo.png"], 4, "photo.png: header must be"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(run, words: list[str], expected: int, said: str) -> None:
    code, out, err = run(*EDIT, *words, "-o", "out.png")
    assert (code, out) == (expected, "") and said in err, err
    assert "Traceback" not in err and not Path("out.png").exists()


def test_rerun_refuses_numerics_that_are_none(run) -> None:
    assert run(*EDIT, "-o", "out.png")[0] == 0
    for spoiled in ("none", {"vae_tile": "many"}, {"vae_tile": 7}, {"weights": "int4"}):
        with Image.open("out.png") as image:
            write_picture(Path("spoiled.png"), image, read_metadata(Path("out.png")) | {"numerics": spoiled})
        code, _, err = run("rerun", "spoiled.png")
        assert code in (2, 3) and "must be" in err and "Traceback" not in err, err
