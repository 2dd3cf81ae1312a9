"""Masks, change masks, sizes and templates on the command line, with the tiny model where pixels matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qengine.cli import main

PHOTO = Path(__file__).parents[1] / "photos" / "cat.jpg"


def asked(engine, run, *words: str):
    assert run("edit", "photo.png", "x", *words)[0] == 0
    return engine.requests[-1]


@pytest.mark.parametrize("flag", ["--mask", "--mask_path"])
def test_M29_a_mask_by_either_spelling(engine, run, flag: str) -> None:
    Image.new("L", (40, 20), 255).save("mask.png")
    assert asked(engine, run, flag, "mask.png").keep.mask == "mask.png"
    assert run("edit", "photo.png", "x", "--mask", "mask.png", "-o", "mask.png")[0] == 2


def test_M30_M31_M32_M33_musubis_words_mean_what_they_mean_there(engine, run) -> None:
    keep = asked(engine, run, "--rcm_threshold", "0.2", "--rcm_kernel_size", "5", "--rcm_dilate_size", "1").keep
    assert (keep.rcm_threshold, keep.rcm_relative_threshold) == (0.2, None)
    assert (keep.rcm_kernel_size, keep.rcm_dilate_size) == (5, 1)
    keep = asked(engine, run, "--rcm-threshold", "0.2", "--rcm-relative-threshold").keep
    assert (keep.rcm_threshold, keep.rcm_relative_threshold) == (None, 0.2)
    assert run("edit", "photo.png", "x", "--rcm_relative_threshold")[0] == 2
    assert asked(engine, run).keep.rule is None


def test_M35_a_mask_and_a_change_mask_exclude_each_other(engine, run) -> None:
    code, _, err = run("edit", "photo.png", "x", "--mask", "other.png", "--rcm")
    assert code == 2 and "in one way, got mask and rcm" in err
    assert run("edit", "photo.png", "x", "--rcm", "--rcm-sensitivity", "3")[0] == 2


def test_M18_M19_M20_the_size_of_the_pictures_is_told_once(engine, run) -> None:
    assert asked(engine, run, "--resize_control_to_image_size").resize_control == "image"
    assert asked(engine, run, "--resize-control-to-official-size").resize_control == "official"
    assert asked(engine, run, "--resize-control", "none").resize_control == "none"
    assert asked(engine, run).resize_control is None
    code, _, err = run("edit", "photo.png", "x", "--resize_control_to_image_size", "--resize_control_to_official_size")
    assert code == 2 and "told once" in err


def test_E18_a_template_makes_the_prompt(engine, run) -> None:
    words = ["--template", "professional", "--fill", "role=CEO", "attire=suit", "--fill=setting=a stage"]
    words += ["--fill", "lighting=blue light", "--fill", "mood=calm"]
    assert run("edit", "photo.png", *words)[0] == 0
    assert engine.request.prompt == "CEO, suit, a stage, blue light, calm"
    assert run("edit", "photo.png", "--template", "professional", "--fill", "role=CEO")[0] == 2
    assert run("edit", "photo.png", "x", "--fill", "role=CEO")[0] == 2
    assert run("edit", "photo.png", "-p", "x", *words)[0] == 2


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    with Image.open(PHOTO) as photo:
        photo.convert("RGB").resize((64, 64)).save("photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def test_outside_the_mask_the_output_is_the_input_bit_for_bit_and_reruns_so(small: Path, capsys) -> None:
    words = ["--size", "64x64", "--steps", "2", "--mask", "mask.png"]
    assert main(["edit", "photo.png", "make it grayscale", *words, "-o", "out.png"]) == 0
    assert "50.0% of it is to change, read from its brightness" in capsys.readouterr().err
    with Image.open("photo.png") as before, Image.open("out.png") as after:
        first, second = np.asarray(before), np.asarray(after)
    assert (first[:, 32:] == second[:, 32:]).all() and (first[:, :24] != second[:, :24]).any()
    assert main(["rerun", "out.png", "-o", "again.png"]) == 0
    with Image.open("again.png") as again:
        assert (np.asarray(again) == second).all()


def test_M34_the_mask_of_every_step_from_the_first_on_is_written(small: Path, capsys) -> None:
    words = ["--size", "64x64", "--steps", "3", "--rcm_threshold", "0.3", "--rcm_relative_threshold"]
    assert main(["edit", "photo.png", "make it grayscale", *words, "--rcm_debug_save", "-o", "out.png", "--json"]) == 0
    assert sorted(path.name for path in small.glob("*rcm_mask*")) == ["out_rcm_mask_01.png", "out_rcm_mask_02.png"]
    with Image.open("out_rcm_mask_01.png") as mask:
        assert mask.size == (64, 64)
    record = json.loads(capsys.readouterr().out)["outputs"][0]["metadata"]["request"]
    assert record["keep"] == {"rcm_relative_threshold": 0.3}


@pytest.mark.parametrize("bad", ["size", "black"])
def test_a_mask_that_cannot_be_used_is_refused_and_nothing_written(small: Path, capsys, bad: str) -> None:
    Image.new("L", (63, 64) if bad == "size" else (64, 64), 255 if bad == "size" else 0).save("mask.png")
    assert main(["edit", "photo.png", "x y", "--mask", "mask.png", "-o", "out.png"]) == 3
    assert "mask.png must be" in capsys.readouterr().err and not Path("out.png").exists()


def test_R02_R06_R07_references_by_flag(engine, run) -> None:
    plain = asked(engine, run).reference
    assert (plain.method, plain.strength) == ("default", 1.0)
    made = asked(engine, run, "--reference-method", "concat:0.5,inject", "--reference_strength", "0.2:1.0").reference
    assert (made.method, made.strength) == ("concat:0.5,inject", "0.2:1.0")
    code, _, err = run("edit", "photo.png", "x", "--reference-method", "mix")
    assert code == 2 and "default, inject, concat, cross_attn" in err
    assert run("edit", "photo.png", "x", "--reference-strength", "2.1")[0] == 2


def test_R22_one_strength_and_one_mask_per_picture(engine, run) -> None:
    assert run("edit", "photo.png", "other.png", "-p", "x", "--reference-strength", "1", "0")[0] == 0
    assert engine.requests[-1].reference.strength == ("1", "0")
    words = ["--reference-mask", "photo.png", "other.png", "--mask-vision", "off", "--negative-reference", "off"]
    assert run("edit", "photo.png", "other.png", "-p", "x", *words)[0] == 0
    made = engine.requests[-1].reference
    assert made.masks == ("photo.png", "other.png") and not made.mask_vision and not made.negative
    assert run("edit", "photo.png", "x", "--reference-mask", "photo.png", "other.png")[0] == 2


def test_R17_R18_R19_presets_and_edit_types_by_flag_and_flags_beside_them_win(engine, run) -> None:
    assert asked(engine, run, "--preset", "replace").reference.method == "cross_attn"
    made = asked(engine, run, "--edit-type", "colour", "--reference-strength", "0.8")
    assert (made.reference.method, made.reference.strength, made.denoise) == ("inject", "0.8", 0.4)
    assert asked(engine, run, "--denoise", "0.5").denoise == 0.5
    assert run("edit", "photo.png", "x", "--preset", "style", "--edit-type", "style")[0] == 2
    assert run("edit", "photo.png", "x", "--denoise", "1.5")[0] == 2


def test_a_run_with_references_and_their_masks_reruns_to_the_bit(small: Path, capsys) -> None:
    words = ["--size", "64x64", "--steps", "3", "--reference-method", "concat:0.5,inject", "--denoise", "0.7"]
    words += ["--reference-strength", "0.3:0.9", "--reference-mask", "mask.png"]
    assert main(["edit", "photo.png", "make it grayscale", *words, "-o", "out.png"]) == 0
    assert main(["rerun", "out.png", "-o", "again.png"]) == 0
    with Image.open("out.png") as first, Image.open("again.png") as again:
        assert (np.asarray(first) == np.asarray(again)).all()
