"""Whole runs of Z-Image through the engine: parity with diffusers, starting from a picture, sizes, the step API."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from qengine import Decoded, EditRequest, Encoded, Engine, GenerateRequest, RunState, Step
from qengine.engine.defaults import DEFAULTS
from qengine.engine.dit.kernels import SAFE
from qengine.engine.resolve import resolve
from qengine.engine.zimage import ZImageTransformer
from qengine.engine.zimage.captions import CaptionRefiner
from qengine.errors import Cancelled, KernelError, RequestError
from zpipelines import reference_img2img, reference_zimage, shared_zimage

WIDTH, HEIGHT = 80, 48
TURBO = DEFAULTS["z-image-turbo"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each network evaluation had."""
    calls: list[int] = []
    velocity = ZImageTransformer.velocity

    def count(self: ZImageTransformer, tokens: torch.Tensor, contexts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(contexts))
        return velocity(self, tokens, contexts, *args, **options)

    monkeypatch.setattr(ZImageTransformer, "velocity", count)
    return calls


def picture(width: int = WIDTH, height: int = HEIGHT, seed: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def small(**options: Any) -> GenerateRequest:
    return GenerateRequest(**({"prompt": "a cat", "num_inference_steps": 2, "size": (WIDTH, HEIGHT)} | options))


def last(engine: Engine, request: GenerateRequest, **how: Any) -> Decoded:
    *_, decoded = engine.stream(request, **how)
    assert isinstance(decoded, Decoded)
    return decoded


GUIDANCES: list[dict[str, Any]] = [
    {"guidance_scale": 0.0},
    {"guidance_scale": 3.0},
    {"guidance_scale": 4.0, "cfg_normalization": 0.8, "cfg_truncation": 0.3},
]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=["none", "plain", "all"])
def test_S13_text_to_image_equals_diffusers(engine: Engine, guidance: dict[str, Any], counted: list[int]) -> None:
    guided = guidance["guidance_scale"] > 0
    negative = {"negative_prompt": "gray"} if guided else {}
    made = engine.generate(
        "make it night", size=(WIDTH, HEIGHT), num_inference_steps=5, seed=42, **guidance, **negative
    )
    asked: dict[str, Any] = {
        "prompt": "make it night",
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 5,
        **guidance,
        **negative,
    }
    latents = reference_zimage()(**asked, generator=torch.Generator().manual_seed(42), output_type="latent").images
    torch.testing.assert_close(made.latents[:, :, 0], latents, atol=1e-5, rtol=1e-5)
    assert counted == ([1] * 5 if not guided else [2] * 5 if "cfg_truncation" not in guidance else [2] * 3 + [1] * 2)
    expected = reference_zimage()(**asked, generator=torch.Generator().manual_seed(42), output_type="pt").images
    assert (pixels(made.image) - expected).abs().max() < 1 / 255
    assert expected.std() > 0.05


def by_the_seeds_rule(self: Any, steps: int, strength: float, device: Any) -> tuple[torch.Tensor, int]:
    """`get_timesteps` of diffusers with the start step of the seed."""
    start = steps - min(int(steps * strength + 1e-9), steps)
    self.scheduler.set_begin_index(start)
    return self.scheduler.timesteps[start:], steps - start


@pytest.mark.parametrize(("steps", "strength"), [(9, 0.9), (4, 0.5), (2, 1.0)])
def test_S08_image_to_image_equals_diffusers_from_the_start_step_of_the_seed(
    engine: Engine, steps: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = reference_img2img()
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(type(pipeline), "get_timesteps", by_the_seeds_rule)
    expected = pipeline(
        prompt="make it a cat",
        image=pixels(picture()),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    how = {"strength": strength, "num_inference_steps": steps}
    made = engine.generate("make it a cat", init_image=picture(), seed=11, **how)
    torch.testing.assert_close(made.latents[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    assert made.image.size == (WIDTH, HEIGHT)


def test_S09_the_start_is_logged_and_told(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    lines = [
        "[img2img] strength=0.9, steps=9, actual_steps=8",
        "[img2img] Starting denoising from step 1, 8 steps remaining",
    ]
    request = small(init_image=picture(), strength=0.9, num_inference_steps=9)
    with caplog.at_level(logging.INFO, logger="qengine"):
        events = list(engine.stream(request))
    assert [record.getMessage() for record in caplog.records if "img2img" in record.getMessage()] == lines
    assert isinstance(events[0], Encoded) and [note for note in events[0].notes if "img2img" in note] == lines
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.index for step in steps] == [*range(1, 9)] and {step.total for step in steps} == {9}
    assert steps[0].sigma == pytest.approx(0.96, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, 9), ({"schedule": "official9"}, 8), ({"init_image": picture(), "strength": 0.9}, 8)],
    ids=["modern", "official9", "picture"],
)
def test_S11_steps_count_network_evaluations(
    engine: Engine, options: dict[str, Any], calls: int, counted: list[int]
) -> None:
    last(engine, small(num_inference_steps=9, **options))
    assert counted == [1] * calls


def test_S16_a_picture_of_any_size_comes_out_at_that_size(engine: Engine) -> None:
    made = engine.generate("x", init_image=picture(1000, 777), strength=1.0, num_inference_steps=1)
    assert made.image.size == (1000, 777) and made.latents.shape == (1, 16, 1, 98, 126)
    assert any("1000x777 is made as 1008x784" in note for note in made.notes)
    encoded = engine.generate("x", init_image=picture(70, 45), strength=0.0)
    assert encoded.image.size == (70, 45) and encoded.latents.shape == (1, 16, 1, 6, 10)


def test_S16_floor16_rounds_both_sides_down(engine: Engine) -> None:
    job = resolve(GenerateRequest(prompt="x", init_image=picture(1000, 777), size_rule="floor16"), TURBO, 16)
    assert (job.target.width, job.target.height) == (992, 768) == job.target.padded
    assert job.target.grid == (96 // 2, 124 // 2)
    assert any("floor16 rounds 1000x777 down" in note for note in job.notes)
    made = engine.generate("x", init_image=picture(100, 77), strength=0.5, num_inference_steps=2, size_rule="floor16")
    assert made.image.size == (96, 64) and made.latents.shape == (1, 16, 1, 8, 12)
    assert made.metadata["request"]["size_rule"] == "floor16"
    with pytest.raises(RequestError, match="at least 16x16 with floor16, got 80x9"):
        engine.generate("x", size=(80, 9), size_rule="floor16")


def test_S16_a_picture_beyond_the_models_area_is_scaled_to_it_and_the_note_says_so() -> None:
    job = resolve(GenerateRequest(prompt="x", init_image=picture(2000, 1000)), TURBO, 16)
    assert (job.target.width, job.target.height) == (1456, 720)
    assert any("output is 1456x720" in note for note in job.notes)
    kept = resolve(GenerateRequest(prompt="x", init_image=picture(2000, 1000), size=(64, 64)), TURBO, 16)
    assert kept.target.padded == (64, 64)


def test_S17_without_a_size_the_picture_is_1024_by_1024() -> None:
    for name, steps, scale in (("z-image-turbo", 9, 0.0), ("z-image", 28, 4.0)):
        job = resolve(GenerateRequest(prompt="x"), DEFAULTS[name], 16)
        assert (job.target.width, job.target.height) == (1024, 1024)
        assert (job.num_inference_steps, job.guidance_scale, job.schedule) == (steps, scale, "modern")
        assert job.negative_prompt == ("" if scale else None)


def test_S18_the_same_seed_gives_the_same_bits_and_another_others(engine: Engine) -> None:
    first, again, other = (last(engine, small(seed=seed)) for seed in (42, 42, 43))
    assert torch.equal(first.latents, again.latents) and first.image.tobytes() == again.image.tobytes()
    assert not torch.equal(first.latents, other.latents)
    started, repeated = (last(engine, small(seed=42, init_image=picture())) for _ in range(2))
    assert torch.equal(started.latents, repeated.latents) and not torch.equal(started.latents, first.latents)


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_no_step_is_a_round_trip_that_reads_no_transformer(strength: float, tmp_path: Path) -> None:
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path) as opened:
        made = opened.generate("x", init_image=picture(), strength=strength, num_inference_steps=9)
        vae = opened._components.vae
        assert "load transformer" not in opened._components.log
    assert any("no step is run" in note for note in made.notes)
    torch.testing.assert_close(made.latents, vae.encode(pixels(picture()) * 2 - 1), atol=1e-6, rtol=0)


def test_a_picture_to_start_from_has_a_strength_of_three_quarters() -> None:
    job = resolve(small(init_image=picture(), num_inference_steps=8), TURBO, 16)
    assert job.denoise == 0.75 and job.start == 2
    assert "[img2img] strength=0.75, steps=8, actual_steps=6" in job.notes


def test_what_contradicts_itself_is_refused(engine: Engine) -> None:
    for options, words in (
        ({"strength": 1.5, "init_image": picture()}, "strength must be from 0 to 1, got 1.5"),
        ({"strength": -0.1, "init_image": picture()}, "strength must be from 0 to 1"),
        ({"strength": 0.5}, "strength must stand beside init_image"),
        ({"schedule": "old"}, "schedule must be one of modern, official9, got 'old'"),
        ({"size_rule": "round"}, "size_rule must be one of pad, floor16"),
        ({"cfg_truncation": 2}, "cfg_truncation must be from 0 to 1, got 2"),
        ({"true_cfg_scale": 2.0, "guidance_scale": 1.0}, "guidance must be given once"),
        ({"schedule": "official9", "num_inference_steps": 1}, "official9 must be at least 2"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.plan(small(**options))
    with pytest.raises(RequestError, match="this model must get text alone, got 1 picture"):
        engine.edit(picture(), "x")
    with pytest.raises(RequestError, match="init_image and strength must be left out of an edit"):
        EditRequest(images=(picture(),), prompt="x", init_image=picture())
    for field, value in (("schedule", "modern"), ("cfg_normalization", 1.0), ("cfg_truncation", 0.5)):
        with pytest.raises(RequestError, match=f"{field} must be left out with this model"):
            resolve(GenerateRequest(prompt="x", **{field: value}), DEFAULTS["qwen-image"], 16)


def test_ordinary_guidance_is_one_more_and_a_note_says_so() -> None:
    job = resolve(small(true_cfg_scale=4.0), TURBO, 16)
    assert job.guidance_scale == 3.0 and job.negative_prompt == ""
    assert any("sets guidance_scale to 3" in note for note in job.notes)
    unused = resolve(small(negative_prompt="gray"), TURBO, 16)
    assert unused.negative_prompt is None and any("guidance_scale is 0" in note for note in unused.notes)


def test_a_stream_can_be_watched_saved_and_resumed(engine: Engine, tmp_path: Path) -> None:
    request = small(num_inference_steps=4, init_image=picture(70, 45), size=None)
    events = list(engine.stream(request))
    assert [type(event) for event in events] == [Encoded, Step, Step, Step, Decoded]
    step = events[1]
    assert isinstance(step, Step) and step.preview().size == (70, 45) and step.latents.shape == (1, 16, 1, 6, 10)
    step.save(tmp_path / "state.safetensors")
    state = RunState.load(tmp_path / "state.safetensors")
    assert isinstance(events[-1], Decoded)
    assert torch.equal(last(engine, request, resume=state).latents, events[-1].latents)
    with pytest.raises(RequestError, match="must be of this request"):
        last(engine, small(num_inference_steps=4), resume=state)


def test_a_run_can_be_cancelled_from_another_thread(engine: Engine) -> None:
    with pytest.raises(Cancelled):
        for event in engine.stream(small(num_inference_steps=8)):
            if isinstance(event, Step):
                thread = threading.Thread(target=engine.cancel)
                thread.start()
                thread.join()
    assert last(engine, small()).image.size == (WIDTH, HEIGHT)


def test_the_record_says_what_was_asked(engine: Engine) -> None:
    said = last(engine, small(init_image=picture(), strength=0.5, cfg_truncation=0.9, guidance_scale=2.0)).metadata
    request = said["request"]
    assert request["strength"] == 0.5 and request["init_image"]["sha256"] and "denoise" not in request
    assert request["guidance_scale"] == 2 and request["cfg_truncation"] == 0.9 and "true_cfg_scale" not in request


def spoil(monkeypatch: pytest.MonkeyPatch, *, always: bool) -> None:
    velocity = ZImageTransformer.velocity

    def spoiled(self: ZImageTransformer, *given: Any, **options: Any) -> list[torch.Tensor]:
        made = velocity(self, *given, **options)
        return [each * float("nan") for each in made] if always or not options["safe"] else made

    monkeypatch.setattr(ZImageTransformer, "velocity", spoiled)


def test_a_step_that_is_not_finite_is_done_again_in_the_definitions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, always=False)
    events = list(engine.stream(small()))
    steps = [event for event in events if isinstance(event, Step)]
    assert all("was not finite and was done again" in step.notes[0] for step in steps)
    assert torch.isfinite(steps[-1].latents).all()
    spoil(monkeypatch, always=True)
    with pytest.raises(KernelError, match="velocity of step 1 of 2 must be finite"):
        last(engine, small())


def test_captions_that_are_not_finite_are_refined_again_in_the_definitions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = small(prompt="a caption of its own")
    refine = CaptionRefiner._refine
    asked = []

    def spoiled(self: CaptionRefiner, prompts: Any, kernels: Any) -> list[torch.Tensor]:
        asked.append(kernels)
        made = refine(self, prompts, kernels)
        return made if kernels is SAFE else [each * float("nan") for each in made]

    with monkeypatch.context() as patch:
        patch.setattr(CaptionRefiner, "_refine", spoiled)
        made = last(engine, request)
    assert [kernels is SAFE for kernels in asked] == [False, True, True]
    engine.release()
    torch.testing.assert_close(made.latents, last(engine, request).latents, atol=1e-5, rtol=1e-5)
