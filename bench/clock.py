"""Time on a device: by events on a CUDA card, with its cache cold before every call, by the clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

FLUSH_BYTES = 512 << 20
"""More than any card's second-level cache; written between calls, so that none finds its inputs there.

It also keeps the card busy while the host prepares the next call, so that launching is not timed.
"""

TICK_SECONDS = 0.002
"""A sample on a CPU lasts at least as long, by repeating calls that are shorter."""

MOST_TIMED_CALLS = 9


class Stopwatch:
    """Seconds between marks: by events on a CUDA device, so that no mark waits, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note this moment of the current stream."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """From each mark to the next; waits for the device."""
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median time of ``run`` after one call that is thrown away; calls follow each other, caches stay as they are."""
    run()
    watch = Stopwatch(device)
    watch.mark()
    for _ in range(repeats):
        run()
        watch.mark()
    return statistics.median(watch.seconds())


def seconds(run: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Time of one call: the mean of ``calls`` on a CPU, the median of them from a cold cache on CUDA."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    flush = _flusher(device)
    found = []
    for _ in range(calls):
        flush.zero_()
        watch = Stopwatch(device)
        watch.mark()
        run()
        watch.mark()
        found.append(watch)
    return statistics.median(watch.seconds()[0] for watch in found)


def enough_calls(one_seconds: float, device: torch.device) -> int:
    """How many calls make a sample that the clock can tell; events tell shorter times, and take the median of few."""
    calls = max(1, math.ceil(TICK_SECONDS / max(one_seconds, 1e-7)))
    return calls if device.type == "cpu" else min(calls, MOST_TIMED_CALLS)


@cache
def _flusher(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
