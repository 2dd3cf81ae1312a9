"""What is encoded beforehand stands in for the encoders: the same bits, with neither text encoder nor pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import Decoded, EditRequest, Engine, GenerateRequest
from qengine.engine.defaults import DEFAULTS
from qengine.engine.given import Given
from qengine.engine.plan import Budget, phases
from qengine.engine.reference.options import Reference
from qengine.errors import PlanError, RequestError
from zpipelines import shared_zimage

AREA = 64 * 64


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The tiny models run at their size."""
    for name, defaults in list(DEFAULTS.items()):
        small = replace(defaults, area_pixels=AREA, condition_area_pixels=AREA)
        if defaults.reference_area_pixels is not None:
            small = replace(small, reference_area_pixels=AREA)
        monkeypatch.setitem(DEFAULTS, name, small)
    yield


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = (picture(97, 61, 1), picture(50, 83, 2))


def run(engine: Engine, request: GenerateRequest) -> Decoded:
    *_, last = engine.stream(request)
    assert isinstance(last, Decoded)
    return last


def same(first: Decoded, second: Decoded) -> bool:
    pictures = [np.asarray(each.image) for each in (first, second)]
    return torch.equal(first.latents, second.latents) and np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("kind", "count", "scale"), [("edit", 1, 4.0), ("edit-2509", 2, 1.0), ("edit-2511", 2, 4.0), ("edit-2511", 1, 1.0)]
)
def test_an_edit_from_what_was_extracted_has_the_bits_of_an_edit(
    tmp_path: Path, kind: str, count: int, scale: float
) -> None:
    request = EditRequest(
        images=PICTURES[:count], prompt="make it night", true_cfg_scale=scale, num_inference_steps=2, seed=5
    )
    with Engine.open(shared_pipeline(kind), device="cpu", cache_dir=tmp_path / "here") as here:
        whole = run(here, request)
        given = here.extract(request)
    assert (given.negative_embeds is None) == (scale == 1)
    assert len(given.references) == count and given.size == whole.image.size and given.init is None
    bare = GenerateRequest(prompt="make it night", true_cfg_scale=scale, num_inference_steps=2, seed=5, given=given)
    with Engine.open(shared_pipeline(kind), device="cpu", cache_dir=tmp_path / "there") as there:
        assert same(whole, run(there, bare))
        assert same(whole, run(there, replace(request, given=given)))
        assert "load text_encoder" not in there._components.log


def test_an_edit_that_starts_from_its_picture_does_so_from_given_latents(tmp_path: Path) -> None:
    request = EditRequest(
        images=PICTURES[:1], prompt="make it night", num_inference_steps=4, true_cfg_scale=1, denoise=0.5, size=(48, 80)
    )
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path) as engine:
        whole = run(engine, request)
        given = engine.extract(request)
        assert given.init is not None and given.init.shape[-2:] == (10, 6)
        assert same(whole, run(engine, replace(request, images=(), given=given)))


@pytest.mark.parametrize("strength", [None, 1.0, 0.6, 0.0])
def test_z_image_from_what_was_extracted_has_the_bits_of_one_process(tmp_path: Path, strength: float | None) -> None:
    request = GenerateRequest(prompt="a red bicycle", num_inference_steps=3, guidance_scale=2.0, size=(40, 56), seed=3)
    if strength is not None:
        request = replace(request, init_image=PICTURES[0], strength=strength)
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path / "here") as here:
        whole = run(here, request)
        given = here.extract(request)
    assert (given.init is None) == (strength is None)
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path / "there") as there:
        assert same(whole, run(there, replace(request, init_image=None, given=given)))
        assert "load text_encoder" not in there._components.log


def test_latents_of_the_start_are_there_at_every_strength_so_that_it_can_be_chosen_later(tmp_path: Path) -> None:
    request = GenerateRequest(prompt="a red bicycle", num_inference_steps=3, size=(40, 56), init_image=PICTURES[0])
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path) as engine:
        made = [engine.extract(replace(request, strength=strength)).init for strength in (1.0, 0.4)]
    assert made[0] is not None and made[1] is not None and torch.equal(made[0], made[1])


def test_a_step_without_a_picture_cannot_be_encoded_beforehand(tmp_path: Path) -> None:
    request = EditRequest(images=PICTURES, prompt="make it night", reference=Reference(strength=(0.0, 1.0)))
    with (
        Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path) as engine,
        pytest.raises(RequestError, match="every picture must be seen by every step"),
    ):
        engine.extract(request)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Given(torch.zeros(4, 3)), "prompt_embeds must be .* wide as this transformer reads them, got 3"),
        (Given(init=torch.zeros(1, 5, 1, 4, 4), size=(32, 32)), r"init must be \[1, 16, 1, h, w\]"),
        (Given(init=torch.zeros(1, 16, 1, 4, 6), size=(32, 32)), "init must be 4 x 4 latent cells"),
        (Given(references=(torch.zeros(1, 16, 1, 4, 4),), size=(32, 32)), "must get text alone, got 1 picture"),
    ],
)
def test_parts_of_another_model_are_refused(tmp_path: Path, given: Given, words: str) -> None:
    with (
        Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path) as engine,
        pytest.raises(RequestError, match=words),
    ):
        list(engine.stream(GenerateRequest(prompt="a red bicycle", given=given)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_embeds": torch.zeros(3)}, "prompt_embeds must have 2 dimensions"),
        ({"prompt_embeds": torch.full((2, 2), float("nan"))}, "prompt_embeds must be finite"),
        ({"negative_embeds": torch.zeros(2, 2)}, "negative_embeds must come with prompt_embeds"),
        ({"init": torch.zeros(1, 16, 1, 4, 4)}, "size must be given with latents"),
    ],
)
def test_given_parts_are_checked_when_they_are_made(fields: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Given(**fields)


def test_a_machine_that_cannot_render_encodes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = EditRequest(images=PICTURES[:1], prompt="make it night", num_inference_steps=1, true_cfg_scale=1)
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path / "a") as engine:
        plan = engine.plan(request)
        expected = engine.extract(request)
    peaks = {phase.name: phase.vram_bytes for phase in plan.phases}
    needed = max(peaks["encode"], peaks["reference"])
    real = phases._denoise
    monkeypatch.setattr(phases, "_denoise", lambda *facts: replace(real(*facts), device_items=(("room", 1 << 50),)))
    with Engine.open(
        shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path / "b", budget=Budget(vram_bytes=2 * needed)
    ) as engine:
        with pytest.raises(PlanError):
            list(engine.stream(request))
        made = engine.extract(request)
        assert engine.encode(request).cached
        assert [phase.name for phase in engine._components.planned.phases] == ["encode"]
    assert made.key == expected.key
