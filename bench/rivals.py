"""Timing two things against each other: in turns, in one process, so that a busy machine slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Duel:
    """Seconds of both sides, round by round."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median of the rounds' ratios ``theirs / ours``."""
        return statistics.median(b / a for a, b in zip(self.ours, self.theirs, strict=True))


def duel(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int = 5, warmup: int = 1) -> Duel:
    """Run both sides alternately.

    Args:
        ours: the thing measured.
        theirs: its rival.
        rounds: measured rounds.
        warmup: rounds thrown away first.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(warmup + rounds):
        for side, run in zip(seconds, (ours, theirs), strict=True):
            start = time.perf_counter()
            run()
            if index >= warmup:
                side.append(time.perf_counter() - start)
    return Duel(tuple(seconds[0]), tuple(seconds[1]))
