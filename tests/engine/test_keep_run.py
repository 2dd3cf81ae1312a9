"""Masks and change masks at work in whole runs of the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine import EditRequest, Engine
from qengine.engine.compare import compare
from qengine.engine.events import Decoded, Step
from qengine.engine.keep.options import Keep
from qengine.errors import InputError, RequestError

PHOTO = Path(__file__).resolve().parents[1] / "photos" / "astronaut.jpg"
SIZE = 120, 104
STEPS = 3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.open(device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize(SIZE)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    drawn = Image.new("L", SIZE, 0)
    drawn.paste(255, (24, 20, 90, 80))
    return drawn


def run(engine: Engine, photo: Image.Image, keep: Keep, **options: Any) -> tuple[list[Step], Decoded]:
    request = EditRequest(
        images=(photo,), prompt="invert the colors", size=SIZE, num_inference_steps=STEPS, seed=3, keep=keep
    )
    events = list(engine.stream(request, **options))
    assert isinstance(events[-1], Decoded)
    return [event for event in events if isinstance(event, Step)], events[-1]


@pytest.fixture(scope="module")
def free(engine: Engine, photo: Image.Image) -> Decoded:
    return run(engine, photo, Keep())[1]


def test_a_masked_edit_leaves_the_outside_at_infinite_psnr_and_zero_shift(engine, photo, mask, free) -> None:
    steps, done = run(engine, photo, Keep(mask=mask))
    assert all(step.mask is not None and 0 < float(step.mask.mean()) < 1 for step in steps)
    found = compare(photo, done.image, mask)
    assert found.psnr_db == float("inf") and found.shift_pixels == (0, 0) and found.delta_e == 0
    assert compare(photo, free.image, mask).psnr_db < 25
    middle = np.s_[40:64, 48:72]
    got, wanted, before = (np.asarray(image).astype(float)[middle] for image in (done.image, free.image, photo))
    assert np.abs(got - wanted).mean() < 0.25 * np.abs(before - wanted).mean()


def test_M29_a_white_mask_gives_the_bits_of_a_run_without_one(engine, photo, free) -> None:
    done = run(engine, photo, Keep(mask=Image.new("L", SIZE, 255)))[1]
    assert torch.equal(done.latents, free.latents) and done.image.tobytes() == free.image.tobytes()


def test_a_run_with_a_change_mask_goes_on_from_a_saved_state_to_the_same_bits(engine, photo) -> None:
    steps, done = run(engine, photo, Keep(rcm=True))
    assert steps[0].mask is None and all(step.mask is not None for step in steps[1:])
    later, again = run(engine, photo, Keep(rcm=True), resume=steps[1].state)
    assert [step.index for step in later] == [2]
    assert later[0].mask is not None and torch.equal(later[0].mask, steps[2].mask)
    assert torch.equal(again.latents, done.latents) and again.image.tobytes() == done.image.tobytes()


def test_a_picture_that_is_not_seen_at_the_outputs_size_is_refused_before_a_weight_is_read(engine, photo) -> None:
    with pytest.raises(InputError, match="must be 120x104"):
        engine.plan(EditRequest(images=(photo,), prompt="x", size=SIZE, keep=Keep(mask=Image.new("L", (9, 9), 255))))
    request = EditRequest(images=(photo,), prompt="x", size=SIZE, keep=Keep(rcm=True), resize_control="official")
    with pytest.raises(RequestError, match="at the size of the output"):
        engine.plan(request)
