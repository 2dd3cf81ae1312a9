"""Schedule, guidance and whole runs of Z-Image against diffusers, over our encoder, transformer and VAE."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from qengine.engine.kl import KlVAE
from qengine.engine.latents import initial_noise, pack, unpack
from qengine.engine.strength import actual_steps, start_notes
from qengine.engine.zimage import ZImageEncoder, ZImageTransformer
from qengine.engine.zimage.guidance import Guidance
from qengine.engine.zimage.schedule import ZImageSchedule, make_zimage_schedule
from qengine.errors import CheckpointError, RequestError
from zpipelines import SCHEDULER, open_zimage, reference_img2img, reference_zimage, shared_zimage

CPU = torch.device("cpu")
ROWS, COLUMNS = 3, 5
ALONE = Guidance()
WIDTH, HEIGHT = 16 * COLUMNS, 16 * ROWS


@functools.cache
def parts() -> tuple[ZImageEncoder, ZImageTransformer, KlVAE]:
    source = open_zimage(shared_zimage())
    encoder = ZImageEncoder(source, CPU, torch.float32)
    transformer = ZImageTransformer.load(source.transformer, device=CPU, dtype=torch.float32, cache=None)
    return encoder, transformer, KlVAE.load(source.vae, device=CPU, dtype=torch.float32)


@torch.no_grad()
def denoise(
    schedule: ZImageSchedule,
    embeds: list[torch.Tensor],
    latents: torch.Tensor,
    guidance: Guidance = ALONE,
    start: int = 0,
) -> torch.Tensor:
    """From packed noisy latents to clean ones [1, z, 1, h, w]."""
    transformer = parts()[1]
    contexts = transformer.contexts(embeds, ROWS, COLUMNS)
    times = [schedule.timestep(index, torch.float32) for index in range(len(schedule))]
    table = transformer.table(times)
    for index, time in list(enumerate(times))[start:]:
        used = contexts if guidance.is_on(time) else contexts[:1]
        velocities = transformer.velocity(latents, used, table, time, more=index + 1 < len(times))
        latents = schedule.step(index, latents, guidance.combine(velocities))
    return unpack(latents, ROWS, COLUMNS)


def picture(seed: int = 4) -> torch.Tensor:
    """Pixels [1, 3, H, W] in [0, 1]."""
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 28])
def test_S12_sigmas_and_model_times_equal_diffusers(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    schedule = make_zimage_schedule(steps, SCHEDULER)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, atol=1e-6, rtol=0)
    times = torch.tensor([schedule.timestep(i, torch.bfloat16) for i in range(len(schedule))])
    torch.testing.assert_close(times, (1000 - scheduler.timesteps) / 1000, atol=1e-6, rtol=0)


def test_S12_eight_and_nine_steps_are_the_published_lists() -> None:
    eight, nine = (make_zimage_schedule(n, SCHEDULER).sigmas.tolist() for n in (8, 9))
    assert eight == pytest.approx([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0], abs=1e-4)
    assert nine == pytest.approx([1, 0.96, 0.913, 0.8571, 0.7895, 0.7059, 0.6, 0.4615, 0.2727, 0], abs=1e-4)
    assert make_zimage_schedule(9, SCHEDULER, schedule="official9").sigmas.tolist() == eight
    shifted = make_zimage_schedule(4, SCHEDULER, shift=1.0).sigmas.tolist()
    assert shifted == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("strength", "start", "actual"),
    [(1.0, 0, 9), (0.9, 1, 8), (0.8, 2, 7), (0.7, 3, 6), (0.5, 5, 4), (0.3, 7, 2), (0.1, 9, 0), (0.0, 9, 0)],
)
def test_S08_strength_leaves_out_the_first_steps(strength: float, start: int, actual: int) -> None:
    assert actual_steps(9, strength) == actual == 9 - start


def test_S08_products_that_rounding_puts_below_a_whole_number_count_as_it() -> None:
    for steps, strength, actual in ((50, 0.58, 29), (90, 0.7, 63), (100, 0.29, 29), (100, 0.57, 57), (100, 0.58, 58)):
        assert int(steps * strength) == actual - 1
        assert actual_steps(steps, strength) == actual


def test_S09_the_notes_say_where_denoising_starts() -> None:
    assert start_notes(0.9, 9, 9) == (
        "[img2img] strength=0.9, steps=9, actual_steps=8",
        "[img2img] Starting denoising from step 1, 8 steps remaining",
    )
    assert start_notes(0.1, 9, 9)[1] == "[img2img] no step is run: the result is the picture through the VAE and back"


def test_S10_the_start_is_mixed_at_the_sigma_of_its_step() -> None:
    clean, noise = torch.randn(1, 15, 64), torch.randn(1, 15, 64)
    schedule = make_zimage_schedule(9, SCHEDULER)
    sigma = float(schedule.sigmas[3])
    assert sigma == pytest.approx(0.8571, abs=1e-4)
    torch.testing.assert_close(schedule.noised(3, clean, noise), (1 - sigma) * clean + sigma * noise)
    assert torch.equal(schedule.noised(0, clean, noise), noise)
    assert torch.equal(schedule.noised(9, clean, noise), clean)
    assert schedule.noised(3, clean.bfloat16(), noise.bfloat16()).dtype == torch.float32


def test_schedules_that_are_not_defined_are_refused() -> None:
    with pytest.raises(CheckpointError, match="use_dynamic_shifting=false, got True"):
        make_zimage_schedule(9, SCHEDULER | {"use_dynamic_shifting": True})
    with pytest.raises(RequestError, match="must be one of modern, official9, got 'old'"):
        make_zimage_schedule(9, SCHEDULER, schedule="old")
    with pytest.raises(RequestError, match="official9 must be at least 2, got 1"):
        make_zimage_schedule(1, SCHEDULER, schedule="official9")
    with pytest.raises(RequestError, match="at least 1, got 0"):
        make_zimage_schedule(0, SCHEDULER)
    with pytest.raises(RequestError, match="flow shift must be above 0"):
        make_zimage_schedule(9, SCHEDULER, shift=0.0)


@pytest.mark.parametrize("field", ["scale", "normalisation"])
def test_guidance_out_of_range_is_refused(field: str) -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match=f"guidance {field} must be 0 or more"):
            Guidance(**{field: value})
    with pytest.raises(RequestError, match="truncation must be 0 to 1, got 2"):
        Guidance(truncation=2.0)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each network evaluation of our transformer had."""
    calls: list[int] = []
    velocity = ZImageTransformer.velocity

    def count(self: ZImageTransformer, tokens: torch.Tensor, contexts: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(contexts))
        return velocity(self, tokens, contexts, *args, **options)

    monkeypatch.setattr(ZImageTransformer, "velocity", count)
    return calls


def test_S11_steps_count_network_evaluations(counted: list[int]) -> None:
    embeds, noise = parts()[0].encode(["a cat"]), initial_noise(0, 16, ROWS, COLUMNS)
    for options, expected in (({}, 9), ({"schedule": "official9"}, 8)):
        counted.clear()
        denoise(make_zimage_schedule(9, SCHEDULER, **options), embeds, noise)
        assert counted == [1] * expected


GUIDANCES: list[dict[str, Any]] = [
    {},
    {"scale": 3.0},
    {"scale": 0.5, "normalisation": 1.0},
    {"scale": 4.0, "normalisation": 0.8, "truncation": 0.3},
]


@pytest.mark.parametrize("options", GUIDANCES, ids=["none", "plain", "normalised", "truncated"])
def test_S13_text_to_image_latents_equal_the_pipeline(options: dict[str, Any], counted: list[int]) -> None:
    encoder = parts()[0]
    guidance = Guidance(**options)
    embeds = encoder.encode(["make it a cat at night", "gray"])
    ours = denoise(make_zimage_schedule(6, SCHEDULER), embeds, initial_noise(42, 16, ROWS, COLUMNS), guidance)
    expected = reference_zimage()(
        prompt="make it a cat at night",
        negative_prompt="gray",
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=6,
        guidance_scale=guidance.scale,
        cfg_normalization=guidance.normalisation,
        cfg_truncation=guidance.truncation,
        generator=torch.Generator().manual_seed(42),
        output_type="latent",
    ).images
    torch.testing.assert_close(ours[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    if not options:
        assert counted == [1] * 6
    elif guidance.truncation < 1:
        assert counted == [2] * 4 + [1] * 2
    else:
        assert counted == [2] * 6


def test_S14_prompt_embeddings_of_the_reference_give_the_same_latents_as_the_prompt() -> None:
    with torch.no_grad():
        theirs = reference_zimage().encode_prompt("a cat", do_classifier_free_guidance=False)[0]
    noise, schedule = initial_noise(1, 16, ROWS, COLUMNS), make_zimage_schedule(4, SCHEDULER)
    ours = parts()[0].encode(["a cat"])
    torch.testing.assert_close(denoise(schedule, theirs, noise), denoise(schedule, ours, noise), atol=1e-5, rtol=1e-5)
    again = [embeds.clone() for embeds in ours]
    assert torch.equal(denoise(schedule, again, noise), denoise(schedule, ours, noise))


def test_pixels_of_a_whole_run_equal_the_pipeline() -> None:
    encoder, _, vae = parts()
    latents = denoise(
        make_zimage_schedule(5, SCHEDULER), encoder.encode(["night"]), initial_noise(7, 16, ROWS, COLUMNS)
    )
    expected = reference_zimage()(
        prompt="night",
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=5,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    assert expected.std() > 0.05
    torch.testing.assert_close(vae.decode(latents) / 2 + 0.5, expected, atol=1e-5, rtol=0)


def from_picture(steps: int, strength: float, seed: int) -> torch.Tensor:
    """Latents of our image-to-image run of ``picture()``."""
    encoder, _, vae = parts()
    schedule, start = make_zimage_schedule(steps, SCHEDULER), steps - actual_steps(steps, strength)
    clean = pack(vae.encode(picture() * 2 - 1))
    latents = schedule.noised(start, clean, initial_noise(seed, 16, ROWS, COLUMNS))
    return denoise(schedule, encoder.encode(["make it a cat"]), latents, start=start)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (8, 0.25), (5, 1.0)])
def test_image_to_image_equals_the_pipeline_where_both_count_steps_alike(
    steps: int, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    expected = reference_img2img()(
        prompt="make it a cat",
        image=picture(),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).images
    ours = from_picture(steps, strength, 11)[:, :, 0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def by_hand(timesteps: Callable[[Any], Any], seed: int) -> torch.Tensor:
    """diffusers' parts in a loop of its own over some of nine steps."""
    pipeline = reference_img2img()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist())
    times = timesteps(scheduler.timesteps)
    scheduler.set_begin_index(9 - len(times))
    with torch.no_grad():
        embeds = pipeline.encode_prompt("make it a cat", do_classifier_free_guidance=False)[0]
        mean = pipeline.vae.encode(picture() * 2 - 1).latent_dist.mode()
        clean = (mean - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
        latents = scheduler.scale_noise(clean, times[:1], noise)
        for time in times:
            moment = ((1000 - time) / 1000).expand(1)
            out = pipeline.transformer([latents[0][:, None]], moment, embeds, return_dict=False)[0][0]
            latents = scheduler.step(-out[None, :, 0], time, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(("strength", "start"), [(0.9, 1), (0.7, 3), (0.3, 7)])
def test_S08_image_to_image_starts_where_the_seed_says(strength: float, start: int) -> None:
    expected = by_hand(lambda times: times[start:], 5)
    torch.testing.assert_close(from_picture(9, strength, 5)[:, :, 0], expected, atol=1e-5, rtol=1e-5)
    one_more = by_hand(lambda times: times[start - 1 :], 5)
    assert (one_more - expected).abs().max() > 1e-2
