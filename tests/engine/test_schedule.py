"""Noise levels against diffusers' scheduler and against the published lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import SCHEDULER
from qengine.engine.latents import combine, initial_noise, pack, unpack
from qengine.engine.schedule import make_schedule
from qengine.errors import CheckpointError


@pytest.mark.parametrize("tokens", [64, 1000, 4096, 6889])
@pytest.mark.parametrize("steps", [2, 4, 8, 25])
def test_sigmas_equal_diffusers(steps: int, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    mu = 0.5 + (tokens - 256) * 0.4 / 7936
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    schedule = make_schedule(steps, tokens, SCHEDULER)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, atol=1e-6, rtol=0)
    times = torch.tensor([schedule.timestep(i, torch.float32) for i in range(steps)])
    torch.testing.assert_close(times, scheduler.timesteps / 1000, atol=1e-6, rtol=0)


def test_E05_four_and_eight_steps_give_the_published_sigmas() -> None:
    four, eight = (make_schedule(n, 4096, SCHEDULER).sigmas.tolist() for n in (4, 8))
    assert four == pytest.approx([1, 0.7667, 0.4556, 0.02, 0], abs=1e-4)
    assert eight == pytest.approx([1, 0.916, 0.82, 0.7093, 0.5801, 0.4273, 0.2441, 0.02, 0], abs=1e-4)


def test_M16_flow_shift_is_static_and_still_ends_at_the_terminal() -> None:
    static = make_schedule(4, 4096, SCHEDULER, flow_shift=3.0).sigmas
    raw = torch.linspace(1, 0.25, 4)
    shifted = 3 * raw / (1 + 2 * raw)
    stretched = 1 - (1 - shifted) * 0.98 / (1 - shifted[-1])
    torch.testing.assert_close(static[:-1], stretched, atol=1e-6, rtol=0)
    assert make_schedule(4, 64, SCHEDULER, flow_shift=3.0).sigmas.equal(static)
    dynamic = [make_schedule(4, tokens, SCHEDULER).sigmas for tokens in (64, 4096)]
    assert not dynamic[0].equal(dynamic[1])


def test_one_step_goes_from_one_to_zero() -> None:
    assert make_schedule(1, 4096, SCHEDULER).sigmas.tolist() == [1, 0]


def test_a_schedule_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="use_karras_sigmas"):
        make_schedule(4, 64, {**SCHEDULER, "use_karras_sigmas": True})


def test_timesteps_are_rounded_in_the_compute_dtype() -> None:
    schedule = make_schedule(8, 4096, SCHEDULER)
    expected = (schedule.sigmas[1] * 1000).to(torch.bfloat16) / 1000
    assert schedule.timestep(1, torch.bfloat16) == float(expected)


def test_packing_is_undone_by_unpacking() -> None:
    latents = torch.randn(2, 16, 1, 6, 10)
    tokens = pack(latents)
    assert tokens.shape == (2, 15, 64)
    assert torch.equal(unpack(tokens, 3, 5), latents)
    assert tokens[0, 0, 4 * 2 + 2 * 1 + 1] == latents[0, 2, 0, 1, 1]


def test_noise_is_drawn_in_the_layout_of_diffusers() -> None:
    drawn = torch.randn((1, 1, 16, 8, 12), generator=torch.Generator().manual_seed(7))
    expected = drawn.view(1, 16, 4, 2, 6, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 24, 64)
    assert torch.equal(initial_noise(7, 16, 4, 6), expected)


def test_E06_guidance_follows_the_formula_and_keeps_the_norm() -> None:
    positive, negative = torch.randn(2, 1, 5, 64)
    found = combine(positive, negative, 4.0)
    combined = negative + 4 * (positive - negative)
    expected = combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), positive.norm(dim=-1))


def test_guidance_of_a_zero_token_stays_zero() -> None:
    zero = torch.zeros(1, 1, 64)
    assert torch.equal(combine(zero, zero, 4.0), zero)
