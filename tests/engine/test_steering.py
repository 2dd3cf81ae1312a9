"""Whole runs with references of other strengths, masks, a start from the picture, and parts that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import Decoded, EditRequest, Encoded, Engine, RunState, Step
from qengine.engine.defaults import DEFAULTS
from qengine.engine.job import Job
from qengine.engine.keep.options import Keep
from qengine.engine.latents import initial_noise, unpack
from qengine.engine.plan import JobFacts
from qengine.engine.reference.options import Reference
from qengine.engine.resolve import resolve
from qengine.errors import InputError, RequestError

NAME, SIZE = "qwen-image-edit-2511", (48, 32)
SMALL = replace(DEFAULTS[NAME], area_pixels=48 * 48, condition_area_pixels=48 * 48, reference_area_pixels=48 * 48)


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFAULTS, NAME, SMALL)


def picture(seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8))


def mask(box: tuple[int, int, int, int] = (16, 0, 48, 32)) -> Image.Image:
    made = Image.new("L", SIZE, 0)
    made.paste(255, box)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def opened(cache: Path) -> Iterator[Engine]:
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=cache) as made:
        yield made


COMMON: dict[str, Any] = {
    "prompt": "make it night",
    "num_inference_steps": 4,
    "size": SIZE,
    "true_cfg_scale": 3.0,
    "negative_prompt": "ugly",
    "seed": 5,
}


def request(*seeds: int, **fields: Any) -> EditRequest:
    return EditRequest(images=tuple(picture(seed) for seed in seeds or (1,)), **COMMON | fields)


def job(asked: EditRequest) -> Job:
    return resolve(asked, SMALL, 16)


def run(engine: Engine, asked: EditRequest, **how: Any) -> tuple[list[Step], Decoded]:
    events = list(engine.stream(asked, **how))
    last = events[-1]
    assert isinstance(events[0], Encoded) and isinstance(last, Decoded)
    return [event for event in events if isinstance(event, Step)], last


def latents(engine: Engine, asked: EditRequest) -> torch.Tensor:
    return run(engine, asked)[1].latents


def test_R08_strength_0_has_the_latents_of_text_to_image_with_the_same_seed(opened: Engine, cache: Path) -> None:
    with Engine.open(shared_pipeline("qwen-image"), device="cpu", cache_dir=cache) as text:
        expected = text.generate(**COMMON).latents
    for seed in (1, 2):
        assert torch.equal(latents(opened, request(seed, reference=Reference(strength=0.0))), expected)
    seen = latents(opened, request(reference=Reference(strength=0.0, keep_vision_at_zero=True)))
    assert (seen - expected).abs().max() > 1e-3
    black = Reference(masks=(Image.new("L", SIZE, 0),))
    assert torch.equal(latents(opened, request(reference=black)), expected)


def test_R22_a_second_picture_of_strength_0_changes_nothing(opened: Engine) -> None:
    both = request(1, 2, reference=Reference(strength=(1.0, 0.0)))
    assert torch.equal(latents(opened, both), latents(opened, request(1)))


def test_R12_R14_every_step_says_its_method_and_strength(opened: Engine) -> None:
    steps, _ = run(opened, request(reference=Reference(strength="0.2:1.0"), num_inference_steps=5))
    found = [step.reference.strengths[0] for step in steps if step.reference]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    steps, _ = run(opened, request(reference=Reference(strength=0.7)))
    assert [step.reference.strengths for step in steps if step.reference] == [(0.7,)] * 4


def test_R15_switching_methods_is_one_method_and_then_the_other_to_the_bit(opened: Engine) -> None:
    def asked(method: str) -> EditRequest:
        return request(reference=Reference(method=method, strength=0.8))

    switched, last = run(opened, asked("concat:0.5,inject"))
    assert [s.reference.method for s in switched if s.reference] == ["concat"] * 2 + ["inject"] * 2
    concat, _ = run(opened, asked("concat"))
    assert torch.equal(switched[1].latents, concat[1].latents)
    middle = next(iter(s for s in opened.stream(asked("inject")) if isinstance(s, Step))).state
    half = RunState(middle.key, 2, concat[1].state.grid, concat[1].state.latent_tokens)
    assert torch.equal(run(opened, asked("inject"), resume=half)[1].latents, last.latents)


def test_R14_a_schedule_through_0_runs_those_steps_as_text_to_image(opened: Engine) -> None:
    zero, _ = run(opened, request(reference=Reference(strength=0.0)))
    mixed, _ = run(opened, request(reference=Reference(strength="0,0,1,1")))
    assert torch.equal(mixed[1].latents, zero[1].latents) and not torch.equal(mixed[2].latents, zero[2].latents)


@pytest.mark.parametrize(("denoise", "start"), [(1.0, 0), (0.75, 1), (0.6, 2), (0.25, 3)])
def test_R19_denoise_starts_from_the_picture_with_noise_on_it(opened: Engine, denoise: float, start: int) -> None:
    asked = request(denoise=denoise)
    steps, _ = run(opened, asked)
    assert [step.index for step in steps] == list(range(start, 4))
    nothing, _ = run(opened, request())
    if not start:
        assert torch.equal(steps[-1].latents, nothing[-1].latents)
        return
    clean = run(opened, request(denoise=0.0))[1].latents
    noise = initial_noise(5, 16, 2, 3)
    sigma = steps[0].sigma
    begun = (1 - sigma) * clean + sigma * unpack(noise, 2, 3)
    velocity = (begun - steps[0].predicted) / sigma
    expected = begun + (steps[0].sigma_next - sigma) * velocity
    torch.testing.assert_close(steps[0].latents, expected, atol=1e-4, rtol=1e-4)


def test_R19_denoise_0_is_the_picture_as_the_vae_sees_it_and_says_so(opened: Engine) -> None:
    events = list(opened.stream(request(denoise=0.1)))
    assert [type(event) for event in events] == [Encoded, Decoded]
    assert any("no step is run" in note for note in events[0].notes)


def test_a_run_from_the_picture_can_be_resumed_but_not_before_its_start(opened: Engine) -> None:
    asked = request(denoise=0.75)
    steps, last = run(opened, asked)
    assert torch.equal(run(opened, asked, resume=steps[0].state)[1].latents, last.latents)
    with pytest.raises(RequestError, match="saved state"):
        run(opened, asked, resume=replace(steps[0].state, next_step=0))


def test_a_masked_edit_keeps_the_pixels_outside_and_every_step_says_its_mask(opened: Engine) -> None:
    steps, last = run(opened, request(keep=Keep(mask=mask()), resize_control="image"))
    assert all(step.mask is not None for step in steps)
    assert torch.equal(steps[0].mask, torch.tensor([[0.0, 1, 1], [0, 1, 1]]))  # pyright: ignore[reportArgumentType]
    before, after = np.asarray(picture()), np.asarray(last.image)
    assert (before[:, :16] == after[:, :16]).all() and (before[:, 24:] != after[:, 24:]).any()
    clean = run(opened, request(denoise=0.0))[1].latents
    assert torch.equal(last.latents[..., :2], clean[..., :2])


def test_rcm_masks_are_found_from_the_second_step_on(opened: Engine) -> None:
    steps, _ = run(opened, request(keep=Keep(rcm=True), resize_control="image"))
    assert steps[0].mask is None and all(step.mask is not None for step in steps[1:])


def test_a_masked_reference_is_seen_in_part_by_transformer_and_encoder(opened: Engine) -> None:
    whole = latents(opened, request())
    made = [
        latents(opened, request(reference=Reference(masks=(mask(),), mask_vision=vision))) for vision in (True, False)
    ]
    assert all(not torch.equal(whole, one) for one in made) and not torch.equal(*made)
    white = Reference(masks=(Image.new("L", SIZE, 255),))
    assert torch.equal(latents(opened, request(reference=white)), whole)


def test_the_negative_prompt_can_be_without_pictures(opened: Engine) -> None:
    with_pictures, without = (
        latents(opened, request(reference=Reference(negative=negative))) for negative in (True, False)
    )
    assert not torch.equal(with_pictures, without)


def test_the_record_holds_what_was_asked_and_nothing_more() -> None:
    plain = job(request())
    assert not {"reference", "keep", "denoise", "resize_control"} & plain.record().keys()
    asked = request(
        reference=Reference(method="inject", strength=(0.5,), masks=(mask(),)),
        denoise=0.5,
        keep=Keep(mask=mask()),
        resize_control="image",
    )
    record = json.loads(json.dumps(job(asked).record()))
    assert record["reference"]["method"] == "inject" and record["reference"]["strength"] == [0.5]
    assert record["denoise"] == 0.5 and record["resize_control"] == "image"
    assert len(record["reference"]["masks"][0]["sha256"]) == 64 and record["keep"]["mask"]["path"] == "mask"
    other = job(replace(asked, reference=replace(asked.reference, masks=(mask((0, 0, 16, 32)),))))
    assert len({one.key({}) for one in (plain, job(asked), other)}) == 3


def test_a_plan_counts_the_pictures_that_a_step_sees() -> None:
    processor = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 80 * 28 * 28}

    def facts(*seeds: int, **fields: Any) -> JobFacts:
        return JobFacts.of(job(request(*seeds, **fields)), processor)

    none = facts(1, 2, reference=Reference(strength=0.0))
    assert none.reference_tokens == 0 and not none.patches and none.dropped_tokens == 34
    one = facts(1, 2, reference=Reference(strength=(0.0, 0.5)))
    assert len(one.references) == 1 and one.steered and len(one.patches) == 1
    turns = facts(1, 2, reference=Reference(strength=("0,1,1,1", "1,1,1,0")))
    assert len(turns.references) == 2 and turns.casts == 3 and not turns.steered
    assert facts(1, reference=Reference(strength=0.0), denoise=0.5).encoded == ((2, 3),)


def test_masks_of_another_size_and_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="must be 48x32 as picture is, got 20x20"):
        job(request(reference=Reference(masks=(Image.new("L", (20, 20), 9),))))
    with pytest.raises(RequestError, match="one per picture"):
        job(request(1, 2, reference=Reference(strength=(1.0, 0.5, 0.2))))
