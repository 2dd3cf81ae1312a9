"""The command line with the real engine, on a tiny random pipeline and real files."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import shared_pipeline
from qengine.engine.defaults import DEFAULTS

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(autouse=True)
def _small_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and areas that suit random miniatures."""
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    for name, defaults in list(DEFAULTS.items()):
        small = replace(defaults, area_pixels=64 * 64, condition_area_pixels=56 * 56)
        if defaults.reference_area_pixels is not None:
            small = replace(small, reference_area_pixels=64 * 64)
        monkeypatch.setitem(DEFAULTS, name, small)


def ask(*words: str) -> list[str]:
    flags = [
        "--model",
        str(shared_pipeline("edit-2511")),
        "--size",
        "64x48",
        "--steps",
        "2",
        "--cfg",
        "2",
        "--device",
        "cpu",
    ]
    return ["edit", *flags, *words]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("count", [1, 2])
def test_X04_rerun_gives_the_same_bits_and_another_seed_gives_others(run, count: int) -> None:
    words = ["photo.png", "other.png"][:count]
    code, out, err = run(*ask(*words, "make it night", "--seed", "7", "-o", "out.png"))
    assert (code, out) == (0, "out.png\n"), err
    code, out, err = run("rerun", "out.png", "--output-type", "both")
    assert (code, out.split()) == (0, ["out_rerun.png", "out_rerun.safetensors"]), err
    assert (pixels("out.png") == pixels("out_rerun.png")).all()
    assert run("rerun", "out.png", "--seed", "8", "-o", "eight.png")[0] == 0
    assert (pixels("out.png") != pixels("eight.png")).any()


def test_E08_the_same_command_twice_writes_the_same_bits(run) -> None:
    for name in ("a.png", "b.png"):
        assert run(*ask("photo.png", "make it night", "-o", name))[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_E07_guidance_scale_beside_true_cfg_is_ignored_with_a_note(run) -> None:
    assert run(*ask("photo.png", "make it night", "-o", "a.png"))[0] == 0
    code, _, err = run(*ask("photo.png", "make it night", "-o", "b.png", "--guidance-scale", "3.5"))
    assert code == 0 and "note: guidance_scale is ignored" in err
    assert (pixels("a.png") == pixels("b.png")).all()


def test_M12_guidance_scale_alone_sets_the_true_cfg(run) -> None:
    words = [
        "edit",
        "photo.png",
        "make it night",
        "--model",
        str(shared_pipeline("edit-2511")),
        "--size",
        "64x48",
        "--steps",
        "2",
    ]
    assert run(*words, "-o", "a.png", "--cfg", "3.5")[0] == 0
    code, _, err = run(*words, "-o", "b.png", "--guidance_scale", "3.5")
    assert code == 0 and "guidance_scale sets true_cfg_scale to 3.5" in err
    assert (pixels("a.png") == pixels("b.png")).all()


def test_info_tells_what_made_a_picture_and_what_a_model_is(run) -> None:
    assert run(*ask("photo.png", "make it night", "-o", "out.png", "--output-type", "both"))[0] == 0
    for name in ("out.png", "out.safetensors"):
        code, out, err = run("info", name, "--json")
        assert code == 0, err
        assert json.loads(out)["request"]["prompt"] == "make it night"
    code, out, _ = run("info", str(shared_pipeline("edit-2511")), "--json")
    facts = json.loads(out)
    assert (code, facts["variant"]) == (0, "qwen-image-edit-2511")
    assert facts["defaults"]["num_inference_steps"] == 8 and facts["defaults"]["true_cfg_scale"] == 4.0
    assert all(part["parameters"] > 0 for part in facts["components"])
    code, out, _ = run("info", str(shared_pipeline("edit-2511")))
    assert code == 0 and "defaults.num_inference_steps" in out and "transformer" in out


def test_previews_and_odd_sizes_are_told(run, folder: Path) -> None:
    code, _, err = run(*ask("photo.png", "make it night", "-o", "out.png", "--preview", "steps", "--size", "61x45"))
    assert code == 0 and "note: 61x45 is made as" in err
    assert pixels("out.png").shape == (45, 61, 3)
    assert sorted(path.name for path in (folder / "steps").iterdir()) == ["out_step1.png", "out_step2.png"]
    assert pixels("steps/out_step2.png").shape == (45, 61, 3)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that says it is 40000 x 40000."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IEND\xaeB`\x82")


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "bomb", "long"])
def test_a_bad_picture_is_3_without_an_output_file(run, folder: Path, kind: str) -> None:
    bad = folder / "bad.png"
    if kind == "empty":
        bad.write_bytes(b"")
    elif kind == "truncated":
        Image.effect_noise((64, 64), 80).save("whole.png")
        bad.write_bytes(Path("whole.png").read_bytes()[:1000])
    elif kind == "text":
        bad.write_text("not a picture")
    elif kind == "bomb":
        bomb(bad)
    else:
        Image.new("RGB", (1, 5000)).save(bad)
    code, out, err = run(*ask("bad.png", "make it night", "-o", "out.png"))
    assert (code, out) == (3, ""), err
    assert "error: " in err and "bad.png must" in err and "Traceback" not in err
    assert not (folder / "out.png").exists()


def test_a_picture_of_one_pixel_works(run) -> None:
    Image.new("RGB", (1, 1), (250, 1, 1)).save("dot.png")
    code, _, err = run(*ask("dot.png", "make it night", "-o", "out.png"))
    assert code == 0, err


def test_a_prompt_of_20000_characters_is_refused_in_words(run, folder: Path) -> None:
    code, out, err = run(*ask("photo.png", "night " * 3334, "-o", "out.png"))
    assert (code, out) == (2, "") and "prompt must be at most" in err and "Traceback" not in err
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("qwen-image-edit-2512", "did you mean qwen-image-edit"),
        ("tinny", "did you mean tiny?"),
        ("./nowhere", "model must be an existing folder"),
    ],
)
def test_an_unknown_model_is_4_with_the_nearest(run, folder: Path, model: str, words: str) -> None:
    code, out, err = run("edit", "photo.png", "make it night", "--model", model, "--offline", "-o", "out.png")
    assert (code, out) == (4, "") and words in err, err
    assert not (folder / "out.png").exists()


def test_E17_a_model_that_is_not_here_is_4_with_the_pull_command(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for words in (["generate", "a", "--model", "qwen-image", "--offline"], ["verify", "qwen-image"]):
        code, out, err = run(*words)
        assert (code, out) == (4, "") and "hint: qengine pull qwen-image" in err
    assert run("rm", "qwen-image")[0] == 4
    assert run("pull", "qwen-image", "--offline")[0] == 4
    code, out, _ = run("ls", "--json")
    assert code == 0 and all(model["hub_id"] == "tiny" for model in json.loads(out)["models"])


def test_a_text_model_gets_no_picture_and_an_edit_model_needs_one(run) -> None:
    code, _, err = run("edit", "photo.png", "x", "--model", str(shared_pipeline("qwen-image")), "--device", "cpu")
    assert code == 2 and "must get text alone" in err
    code, _, err = run("generate", "x", "--model", str(shared_pipeline("edit-2511")), "--device", "cpu")
    assert code == 2 and "must get a picture" in err


def test_generate_runs_and_reruns(run) -> None:
    words = ["--model", str(shared_pipeline("qwen-image")), "--size", "48x64", "--steps", "2", "--device", "cpu"]
    code, out, err = run("generate", "a red bicycle", *words, "-o", "out.png")
    assert (code, out) == (0, "out.png\n"), err
    assert run("rerun", "out.png")[0] == 0
    assert (pixels("out.png") == pixels("out_rerun.png")).all()


def test_a_device_that_is_not_there_is_7_or_runs(run) -> None:
    code, _, err = run(*ask("photo.png", "x", "-o", "out.png", "--device", "cuda:99"))
    assert code == 7 and "device" in err
    assert run(*ask("photo.png", "x", "-o", "out.png", "--device", "toaster"))[0] == 2
