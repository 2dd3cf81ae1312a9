"""Timing rivals fairly on a busy machine: they run alternately and are compared round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .clock import enough_calls, seconds

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Duel:
    """Seconds of both sides, round by round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median of the rounds' ratios ``theirs / ours``."""
        return ratio(self.theirs, self.ours)


def ratio(above: tuple[float, ...], below: tuple[float, ...]) -> float:
    """Median of the rounds' ratios ``above / below``."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def duel(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device = CPU,
) -> Duel:
    """Run both sides alternately.

    Args:
        ours: the thing measured.
        theirs: its rival.
        rounds: measured rounds.
        warmup: rounds thrown away first.
        device: where the work is done; on CUDA it is timed by events.
    """
    found = in_turns((ours, theirs), rounds=rounds, warmup=warmup, device=device)
    return Duel(found[0], found[1])


def in_turns(
    sides: tuple[Callable[[], object], ...],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device = CPU,
    calls: int | None = 1,
) -> tuple[tuple[float, ...], ...]:
    """Run any number of sides alternately.

    Args:
        sides: what is measured.
        rounds: measured rounds.
        warmup: rounds thrown away first.
        device: where the work is done.
        calls: calls per sample; None repeats calls that are too short for the clock, which the warm-up tells.

    Returns:
        Seconds of one call of each side, round by round.
    """
    warm = [[seconds(side, device) for side in sides] for _ in range(warmup)]
    counts = [calls or enough_calls(min(found), device) for found in zip(*warm, strict=True)] or [calls or 1] * len(
        sides
    )
    table = [[seconds(side, device, n) for side, n in zip(sides, counts, strict=True)] for _ in range(rounds)]
    return tuple(zip(*table, strict=True))
