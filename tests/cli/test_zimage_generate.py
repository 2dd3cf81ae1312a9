"""The command line over a tiny random Z-Image: pictures to start from, its flags, rerun and batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipelines import shared_pipeline
from zpipelines import shared_zimage

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))


def ask(*words: str) -> list[str]:
    return ["generate", "a cat", "--model", str(shared_zimage()), "--device", "cpu", *words]


START = ["--init-image", "photo.png", "--strength", "0.9", "--steps", "3"]


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_S09_a_picture_to_start_from_is_told_and_keeps_its_size(run) -> None:
    code, out, err = run(*ask(*START, "-o", "out.png"))
    assert (code, out) == (0, "out.png\n"), err
    assert "[img2img] strength=0.9, steps=3, actual_steps=2" in err
    assert "[img2img] Starting denoising from step 1, 2 steps remaining" in err
    assert pixels("out.png").shape == (20, 40, 3)


def test_X04_rerun_gives_the_same_bits_and_finds_the_picture_by_its_bytes(run) -> None:
    assert run(*ask(*START, "--seed", "7", "--schedule", "official9", "-o", "out.png"))[0] == 0
    assert run("rerun", "out.png", "-o", "again.png")[0] == 0
    assert (pixels("out.png") == pixels("again.png")).all()
    request = json.loads(run("info", "out.png", "--json")[1])["request"]
    assert request["schedule"] == "official9" and request["strength"] == 0.9 and request["guidance_scale"] == 0
    Path("photo.png").rename("moved.png")
    code, _, err = run("rerun", "out.png")
    assert code == 3 and "give it with --init-image" in err
    assert run("rerun", "out.png", "--init-image", "moved.png", "-o", "third.png")[0] == 0
    assert (pixels("out.png") == pixels("third.png")).all()


def test_the_picture_to_start_from_is_never_overwritten(run) -> None:
    before = Path("photo.png").read_bytes()
    code, _, err = run(*ask(*START, "-o", "photo.png"))
    assert code != 0 and "photo.png" in err and Path("photo.png").read_bytes() == before


def test_guidance_and_sizes_reach_the_engine_and_its_defaults_are_printed(run) -> None:
    words = (
        "--guidance-scale",
        "2",
        "--negative-prompt",
        "gray",
        "--cfg-truncation",
        "0.5",
        "--cfg-normalization",
        "1",
    )
    code, out, err = run(*ask(*words, "--size", "75x40", "--size-rule", "floor16", "--steps", "2", "--json", "-q"))
    assert code == 0, err
    request = json.loads(out)["outputs"][0]["metadata"]["request"]
    assert request["size"] == [64, 32] and request["negative_prompt"] == "gray"
    assert (request["guidance_scale"], request["cfg_truncation"], request["cfg_normalization"]) == (2, 0.5, 1)
    defaults = json.loads(run("info", str(shared_zimage()), "--json")[1])["defaults"]
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], defaults["schedule"]) == (9, 0, "modern")
    assert defaults["max_references"] == 0 and defaults["area_pixels"] == 1024 * 1024


def test_flags_that_do_not_fit_are_refused(run) -> None:
    qwen = ["generate", "a cat", "--model", str(shared_pipeline("qwen-image")), "--device", "cpu", "--size", "32x32"]
    for words, expected in (
        (ask("--strength", "0.5"), "strength must stand beside init_image"),
        (ask("--init-image", "photo.png", "--strength", "1.5"), "strength must be from 0 to 1, got 1.5"),
        (ask("--init-image", "none.png"), "none.png must be a picture"),
        (ask("--schedule", "old"), "old"),
        ([*qwen, "--schedule", "official9"], "schedule must be left out with this model, got 'official9'"),
        ([*qwen, "--cfg-truncation", "0.5"], "cfg_truncation must be left out with this model"),
        (["edit", "photo.png", "x", "--strength", "0.5"], "--strength"),
    ):
        code, out, err = run(*words)
        assert code in (2, 3) and not out and expected in err, (words, err)


def test_denoise_is_the_strength_and_qwen_image_starts_from_a_picture_too(run) -> None:
    words = ("--init-image", "photo.png", "--steps", "4", "--true-cfg-scale", "1", "-o")
    qwen = ["generate", "a cat", "--model", str(shared_pipeline("qwen-image")), "--device", "cpu"]
    assert run(*qwen, *words, "a.png", "--denoise", "0.5")[0] == 0
    code, _, err = run(*qwen, *words, "b.png", "--strength", "0.5")
    assert code == 0 and "actual_steps=2" in err
    assert (pixels("a.png") == pixels("b.png")).all() and pixels("a.png").shape == (20, 40, 3)


def test_a_batch_starts_from_pictures(run) -> None:
    lines = [{"prompt": "a cat", "init-image": "photo.png", "strength": 0.5, "output": "one.png"}, {"prompt": "a dog"}]
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    words = ("--model", str(shared_zimage()), "--device", "cpu", "--steps", "2", "--size", "48x32", "-o", "made")
    code, out, err = run("batch", "jobs.jsonl", *words)
    assert code == 0 and len(out.split()) == 2, err
    assert pixels("made/one.png").shape == (32, 48, 3)
    Path("bad.jsonl").write_text(json.dumps(lines[0] | {"ref": "other.png"}), encoding="utf-8")
    code, _, err = run("batch", "bad.jsonl", *words[:-1], "other")
    assert code == 8 and "--init-image must stand beside a prompt alone" in err
