"""Requests: what is refused, and how a request becomes a job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image
from qengine import EditRequest, GenerateRequest
from qengine.engine.defaults import DEFAULTS
from qengine.engine.resolve import resolve
from qengine.errors import InputError, RequestError

EDIT = DEFAULTS["qwen-image-edit-2511"]


def picture(width: int = 640, height: int = 480) -> Image.Image:
    return Image.new("RGB", (width, height), (10, 200, 30))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "prompt must say"),
        ({"prompt": "  \n"}, "prompt must say"),
        ({"prompt": None}, "prompt must say"),
        ({"negative_prompt": 3}, "negative_prompt must be text"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be from 1"),
        ({"true_cfg_scale": float("nan")}, "true_cfg_scale must be a number"),
        ({"guidance_scale": -1.0}, "guidance_scale must be from 0"),
        ({"flow_shift": 0.0}, "flow_shift must be from 0.001"),
        ({"size": (0, 64)}, "width must be a whole number"),
        ({"size": (64, 100_000)}, "height must be a whole number"),
        ({"size": 512}, "size must be"),
    ],
)
def test_a_request_out_of_range_is_refused_at_construction(fields, words) -> None:
    with pytest.raises(RequestError, match=words):
        GenerateRequest(**{"prompt": "a cat", **fields})


def test_an_edit_without_pictures_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one picture"):
        EditRequest(prompt="x", images=())


def test_text_alone_and_pictures_go_to_the_models_that_take_them() -> None:
    with pytest.raises(RequestError, match="a picture to edit"):
        resolve(GenerateRequest(prompt="x"), EDIT, 16)
    with pytest.raises(RequestError, match="text alone"):
        resolve(EditRequest(prompt="x", images=(picture(),)), DEFAULTS["qwen-image"], 16)
    with pytest.raises(RequestError, match="at most 1 picture"):
        resolve(EditRequest(prompt="x", images=(picture(), picture())), DEFAULTS["qwen-image-edit"], 16)


@pytest.mark.parametrize(("model", "steps", "scale"), [("qwen-image", 25, 4.0), ("qwen-image-edit-2511", 8, 4.0)])
def test_M11_M12_E05_E06_defaults_fill_what_is_left_open(model, steps, scale) -> None:
    images = {} if model == "qwen-image" else {"images": (picture(),)}
    request = EditRequest(prompt="x", **images) if images else GenerateRequest(prompt="x")
    job = resolve(request, DEFAULTS[model], 16)
    assert (job.num_inference_steps, job.true_cfg_scale, job.negative_prompt) == (steps, scale, " ")


def test_E07_guidance_scale_is_ignored_with_a_note_when_true_cfg_is_given() -> None:
    request = EditRequest(prompt="x", images=(picture(),), true_cfg_scale=4.0)
    plain, told = (resolve(r, EDIT, 16) for r in (request, replace(request, guidance_scale=1.0)))
    assert told.record() == plain.record()
    assert any("guidance_scale is ignored" in note for note in told.notes)
    assert not any("guidance_scale" in note for note in plain.notes)


def test_M12_guidance_scale_sets_true_cfg_when_that_is_not_given() -> None:
    job = resolve(GenerateRequest(prompt="x", guidance_scale=2.5), DEFAULTS["qwen-image"], 16)
    assert job.true_cfg_scale == 2.5
    off = resolve(GenerateRequest(prompt="x", guidance_scale=1.0), DEFAULTS["qwen-image"], 16)
    assert (off.true_cfg_scale, off.negative_prompt) == (1.0, None)


def test_E04_a_negative_prompt_enables_the_second_branch() -> None:
    job = resolve(EditRequest(prompt="x", images=(picture(),), negative_prompt="blurry"), EDIT, 16)
    assert job.negative_prompt == "blurry"
    single = resolve(EditRequest(prompt="x", images=(picture(),), negative_prompt="y", true_cfg_scale=1.0), EDIT, 16)
    assert single.negative_prompt is None and any("not used" in note for note in single.notes)


def test_sizes_follow_the_last_picture_and_every_rounding_is_said() -> None:
    images = (picture(), picture(1080, 1920))
    job = resolve(EditRequest(prompt="x", images=images), EDIT, 16)
    assert (job.target.width, job.target.height) == (768, 1376)
    assert any("768x1376" in note for note in job.notes)
    assert [(g.width, g.height) for g in job.references] == [(1184, 896), (768, 1376)]
    odd = resolve(EditRequest(prompt="x", images=images, size=(500, 333)), EDIT, 16)
    assert (odd.target.width, odd.target.height, odd.target.padded) == (500, 333, (512, 336))
    assert any("512x336" in note and "cropped" in note for note in odd.notes)


def test_a_needle_of_a_picture_is_refused_and_a_pixel_is_not() -> None:
    with pytest.raises(InputError, match="1x5000"):
        resolve(EditRequest(prompt="x", images=(picture(1, 5000),)), EDIT, 16)
    assert resolve(EditRequest(prompt="x", images=(picture(1, 1),)), EDIT, 16).target.grid == (64, 64)


def test_the_key_of_a_run_sees_request_pictures_and_surroundings() -> None:
    base = EditRequest(prompt="x", images=(picture(),))
    keys = {
        resolve(request, EDIT, 16).key(around)
        for request in (base, replace(base, seed=1), replace(base, images=(picture(64, 64),)))
        for around in ({"dtype": "float32"}, {"dtype": "bfloat16"})
    }
    assert len(keys) == 6
