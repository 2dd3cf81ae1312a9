"""Noise levels of a run: flow matching with a resolution-dependent shift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CheckpointError


@dataclass(frozen=True)
class Schedule:
    """``sigmas[i]`` is the noise level before step ``i``; the last entry is 0.

    Attributes:
        sigmas: float32 [steps + 1], from 1 downwards.
    """

    sigmas: torch.Tensor

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def timestep(self, index: int, dtype: torch.dtype) -> float:
        """Model time of step ``index``: ``sigma * 1000`` rounded to the compute dtype, divided by 1000 in it.

        This is the one place where sigma becomes a timestep; the rounding is the one the models are used with.
        """
        return float((self.sigmas[index] * 1000).to(dtype) / 1000)

    def noised(self, index: int, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """``(1 - sigma) * clean + sigma * noise`` before step ``index``, in float32.

        Args:
            index: of the step.
            clean: normalised latents, any shape.
            noise: standard normal, the same shape.
        """
        sigma = float(self.sigmas[index])
        return (1 - sigma) * clean.float() + sigma * noise.float()

    def step(self, index: int, latents: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Euler step ``x + (sigma_next - sigma) * v`` in float32."""
        return latents + (self.sigmas[index + 1] - self.sigmas[index]).to(latents.device) * velocity


def make_schedule(
    steps: int, target_tokens: int, config: Mapping[str, Any], *, flow_shift: float | None = None
) -> Schedule:
    """The Qwen-Image schedule.

    ``s = linspace(1, 1/n, n)``, shifted to ``m / (m + 1/s - 1)`` with ``m = e^mu`` (``mu`` linear in the number of
    target tokens) or ``m = flow_shift``, then stretched so that the last value is ``shift_terminal``; 0 is appended.
    One step is ``[1, 0]``: the stretch is not defined there.

    Args:
        steps: number of network evaluations per branch.
        target_tokens: tokens of the picture being made, references not counted.
        config: the scheduler's config.json.
        flow_shift: a static shift that replaces the dynamic one.

    Raises:
        CheckpointError: the config asks for a schedule that this function does not define.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/schedulers/scheduling_flow_match_euler_discrete.py; ours defines
    one step.
    """
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(key):
            raise CheckpointError(f"scheduler config must have {key}=false, got true")
    sigmas = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    factor = _shift_factor(target_tokens, config) if flow_shift is None else flow_shift
    sigmas = factor / (factor + (1 / sigmas - 1))
    terminal = config.get("shift_terminal")
    if terminal and steps > 1:
        rest = 1 - sigmas
        sigmas = 1 - rest / (rest[-1] / (1 - terminal))
    return Schedule(torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)))


def _shift_factor(target_tokens: int, config: Mapping[str, Any]) -> float:
    if not config.get("use_dynamic_shifting", False):
        return float(config.get("shift", 1.0))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    slope = (config.get("max_shift", 1.15) - config.get("base_shift", 0.5)) / (high - low)
    mu = config.get("base_shift", 0.5) + slope * (target_tokens - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
