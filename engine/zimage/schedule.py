"""Noise levels of Z-Image: a static shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import CheckpointError, RequestError
from ..request import SCHEDULES
from ..schedule import Schedule

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
    """Noise levels of a whole run; a picture to start from lets it begin at a later step."""

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
    shift: float | None = None,
) -> ZImageSchedule:
    """The Z-Image schedule: ``s = linspace(1, 1/n, n)``, ``sigma = k s / (1 + (k - 1) s)``, then 0.

    Args:
        steps: network evaluations per branch. With ``official9``: points of the published list, of which the last
            stands at 0 and is not evaluated, so that 9 gives the list of 8.
        config: the scheduler's config.json; ``shift`` (k) is 3.0 as published.
        schedule: ``modern`` or ``official9``.
        shift: replaces the config's.

    Raises:
        RequestError: steps or schedule are none of those above.
        CheckpointError: the config asks for a schedule that this function does not define.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py and
    pipelines/z_image/pipeline_z_image.py.
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
    return ZImageSchedule(sigmas)


def _evaluations(steps: int, schedule: str) -> int:
    if schedule not in SCHEDULES:
        raise RequestError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    least = 1 if schedule == "modern" else 2
    if steps < least:
        raise RequestError(f"steps of the schedule {schedule} must be at least {least}, got {steps}")
    return steps if schedule == "modern" else steps - 1
