"""Bad input: the right exit code, one clear message, no output file, and no model opened for what is known before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def refused(engine, run, folder: Path):
    """Asserts that a line is refused with a code and words, and that nothing was written or opened."""

    def check(code: int, words: str, *line: str) -> str:
        before = sorted(folder.rglob("*"))
        got, out, err = run(*line)
        assert (got, out) == (code, ""), err
        assert err.startswith("error: ") and words in err, err
        assert "Traceback" not in err
        assert sorted(folder.rglob("*")) == before
        assert engine.opened == []
        return err

    return check


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        (3, "gone.png must be a picture, got no such file", ["edit", "gone.png", "sharper"]),
        (3, "must be a picture, got a folder", ["edit", ".", "sharper"]),
        (2, "prompt must say what to make or change", ["edit", "photo.png", ""]),
        (2, "prompt must say what to make or change", ["edit", "photo.png", "-p", "  "]),
        (2, "prompt must be given after the pictures", ["edit", "photo.png"]),
        (2, "prompt must be given after the pictures", ["edit", "photo.png", "other.png"]),
        (2, "prompt must be given after the pictures", ["edit"]),
        (2, "prompt must be given once", ["edit", "photo.png", "make it", "very grey"]),
        (2, "prompt must be given once", ["edit", "photo.png", "make it grey"][:2] + ["make it grey", "-p", "red"]),
        (2, "prompt must be given once", ["generate", "a red", "bicycle", "--model", "x"]),
        (2, "prompt must be given once", ["generate", "a red", "-p", "b", "--model", "x"]),
        (2, "num_inference_steps must be", ["edit", "photo.png", "x", "--steps", "0"]),
        (2, "seed must be", ["edit", "photo.png", "x", "--seed", "-1"]),
        (2, "count must be", ["edit", "photo.png", "x", "-n", "0"]),
        (2, "true_cfg_scale must be", ["edit", "photo.png", "x", "--cfg", "nan"]),
        (2, "--size must be WIDTHxHEIGHT, got '100'", ["edit", "photo.png", "x", "--size", "100"]),
        (2, "width must be", ["edit", "photo.png", "x", "--size", "0x16"]),
        (2, "--image_size must be a height and a width", ["edit", "photo.png", "x", "--image_size", "512"]),
        (2, "the size must be given once", ["edit", "photo.png", "x", "--size", "32x32", "--image_size", "32", "32"]),
        (2, "the output must be named once", ["edit", "photo.png", "x", "-o", "a.png", "--save_path", "b.png"]),
        (2, "got both -q and -v", ["edit", "photo.png", "x", "-q", "-v"]),
        (
            2,
            "a model must be named once",
            ["edit", "photo.png", "x", "--model", "m", "--dit", "a", "--vae", "b", "--text_encoder", "c"],
        ),
        (2, "output must end in one of .png", ["edit", "photo.png", "x", "-o", "out.tga"]),
        (2, "output must differ from the input pictures", ["edit", "photo.png", "x", "-o", "photo.png"]),
        (2, "invalid value for '-s'", ["edit", "photo.png", "x", "--seed", "many"]),
        (2, "'fp8' is not one of", ["edit", "photo.png", "x", "--dtype", "fp8"]),
        (2, "requires an argument", ["edit", "photo.png", "x", "--seed"]),
        (3, "must be an existing folder, got nothing there", ["edit", "photo.png", "x", "-o", "nowhere/out.png"]),
        (3, "must be an existing folder, got a file", ["edit", "photo.png", "x", "-o", "other.png/out.png"]),
        (3, "must be an existing folder, got a file", ["edit", "photo.png", "x", "--preview", "other.png"]),
    ],
)
def test_a_bad_line_is_refused(refused, code: int, words: str, line: list[str]) -> None:
    refused(code, words, *line)


@pytest.mark.parametrize(
    ("word", "near"),
    [("--stpes", "--steps"), ("--guidence_scale", "--guidance-scale"), ("--contol_image_path", "--control-image-path")],
)
def test_an_unknown_flag_is_answered_with_the_nearest(refused, word: str, near: str) -> None:
    err = refused(2, "option must be one that this command has", "edit", "photo.png", "x", word, "3")
    assert "hint: did you mean" in err and near in err


def test_an_unknown_command_is_answered_with_the_nearest(refused) -> None:
    assert "hint: did you mean edit?" in refused(2, "got 'edti'", "edti", "photo.png", "x")
    assert "qengine --help" in refused(2, "got 'zzz'", "zzz")


def test_a_folder_that_cannot_be_written_is_told_before_anything_else(refused, folder: Path) -> None:
    closed = Path("/proc") if sys.platform == "linux" else folder / "closed"
    if sys.platform != "linux":
        closed.mkdir(mode=0o500)
    refused(3, "must be writable", "edit", "photo.png", "x", "-o", str(closed / "out.png"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anything")
def test_a_read_only_file_is_not_overwritten(refused, folder: Path) -> None:
    Image.new("RGB", (8, 8)).save("kept.png")
    (folder / "kept.png").chmod(0o400)
    refused(3, "got a read-only file", "edit", "photo.png", "x", "-o", "kept.png")


def test_an_output_name_that_is_a_folder_with_a_suffix_takes_the_result_inside(engine, run, folder: Path) -> None:
    (folder / "odd.png").mkdir()
    code, out, _ = run("edit", "photo.png", "x", "-o", "odd.png")
    assert code == 0 and Path(out.strip()) == Path("odd.png/photo_edited_0.png")


def test_a_prompt_of_20000_characters_is_passed_on_whole(engine, run) -> None:
    prompt = "grey " * 4000
    assert run("edit", "photo.png", prompt)[0] == 0
    assert engine.request.prompt == prompt


def test_a_prompt_that_starts_with_a_dash_goes_after_two_dashes(engine, run) -> None:
    assert run("edit", "photo.png", "--", "-5 stops darker")[0] == 0
    assert engine.request.prompt == "-5 stops darker"
