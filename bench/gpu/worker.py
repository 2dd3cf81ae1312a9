"""The child's side of the watch: cases by name in, JSON lines on standard output."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Line = Mapping[str, Any]
Run = Callable[[str], Iterator[Line]]


def serve(make: Callable[[bool], Run], argv: Sequence[str] | None = None) -> None:
    """Run the named cases in order; a case that raises ends the process, and the watch starts another for the rest.

    Args:
        make: gets whether it is a toy, returns what runs a case.
        argv: ``--toy`` and names of cases; None takes them from the process.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("cases", nargs="*")
    options = parser.parse_args(argv)
    run = make(options.toy)
    for case in options.cases:
        start = time.perf_counter()
        for line in run(case):
            say({"case": case, **line})
        say({"end": case, "seconds": time.perf_counter() - start})


def say(line: Line) -> None:
    """One line of JSON, flushed."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def pick_device(toy: bool) -> torch.device:
    """The CPU for a toy, else the first CUDA device.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if toy:
        torch.set_num_threads(1)
        return torch.device("cpu")
    torch.cuda.init()
    return torch.device("cuda", 0)


def per_step(seconds: Sequence[float]) -> float:
    """Median over the steps after the first, which loads kernels; a single step stands for itself."""
    return statistics.median(seconds[1:] or seconds)
