"""Noise levels of Z-Image: a static shift, and a later start where a picture is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError, RequestError
from ..request import SCHEDULES
from ..schedule import Schedule
from ..strength import actual_steps, start_notes

_UNKNOWN = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
)


@dataclass(frozen=True)
class ZImageSchedule(Schedule):
    """The steps that are run: ``sigmas[0]`` is the noise level at which the run starts, 1 without a picture.

    Attributes:
        asked: steps of the whole schedule.
        start: how many of them are left out.
        notes: what a user should hear of it, where a picture is given.
    """

    asked: int
    start: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_round_trip(self) -> bool:
        """No step is run: the result is the picture through the VAE and back."""
        return not len(self)

    def timestep(self, index: int, dtype: torch.dtype) -> float:
        """Model time of step ``index``: ``(1000 - 1000 sigma) / 1000`` in float32.

        This is the one place where sigma becomes a timestep. The network embeds it in float32, so it is not rounded to
        the compute dtype.
        """
        return float((1000 - self.sigmas[index] * 1000) / 1000)


def make_zimage_schedule(
    steps: int,
    config: Mapping[str, Any],
    *,
    schedule: str = "modern",
    strength: float | None = None,
    shift: float | None = None,
) -> ZImageSchedule:
    """The Z-Image schedule: ``s = linspace(1, 1/n, n)``, ``sigma = k s / (1 + (k - 1) s)``, then 0.

    Args:
        steps: network evaluations per branch. With ``official9``: points of the published list, of which the last
            stands at 0 and is not evaluated, so that 9 gives the list of 8.
        config: the scheduler's config.json; ``shift`` (k) is 3.0 as published.
        schedule: ``modern`` or ``official9``.
        strength: how much of a given picture is made anew, 0 to 1; None without a picture. The last
            ``min(int(n * strength + 1e-9), n)`` steps are run; at 0 none is, and the picture is encoded and decoded.
        shift: replaces the config's.

    Raises:
        RequestError: steps, schedule or strength are none of those above.
        CheckpointError: the config asks for a schedule that this function does not define.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py and
    pipelines/z_image/pipeline_z_image.py. Its img2img pipeline runs ``ceil(n * strength)`` steps, which at 9 steps and
    strength 0.9 starts from pure noise; ours counts as the line above says.
    """
    evaluations = _evaluations(steps, schedule)
    for key in _UNKNOWN:
        if config.get(key):
            raise CheckpointError(f"scheduler config of Z-Image must have {key}=false, got {config[key]!r}")
    factor = float(config.get("shift", 1.0)) if shift is None else shift
    if factor <= 0:
        raise RequestError(f"flow shift must be above 0, got {factor:g}")
    raw = torch.linspace(1.0, 1.0 / evaluations, evaluations)
    sigmas = torch.cat([factor * raw / (1 + (factor - 1) * raw), torch.zeros(1)])
    if strength is None:
        return ZImageSchedule(sigmas, evaluations)
    if not 0 <= strength <= 1:
        raise RequestError(f"strength must be 0 to 1, got {strength:g}")
    start = evaluations - actual_steps(evaluations, strength)
    return ZImageSchedule(sigmas[start:], evaluations, start, start_notes(strength, steps, evaluations))


def start_latents(schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """``(1 - sigma) * clean + sigma * noise`` at the schedule's first sigma, in float32.

    Args:
        schedule: where the run starts.
        clean: latents of the given picture, normalised, any shape.
        noise: standard normal, the same shape.
    """
    sigma = float(schedule.sigmas[0])
    return (1 - sigma) * clean.float() + sigma * noise.float()


def _evaluations(steps: int, schedule: str) -> int:
    if schedule not in SCHEDULES:
        raise RequestError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    least = 1 if schedule == "modern" else 2
    if steps < least:
        raise RequestError(f"steps of the schedule {schedule} must be at least {least}, got {steps}")
    return steps if schedule == "modern" else steps - 1
