"""Every case of every op: checked against float64 on fresh random inputs, timed beside its eager rival and limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from ...errors import KernelError
from .. import ops
from .worker import Line, Run, pick_device, serve

GOALS = {"copy": 0.85, "gemm": 0.75}
"""Share of the limit that an op should reach: of copy bandwidth, of the best library product."""

JUDGED_SECONDS = 1e-5
"""Shorter work is launching for the most part, and is not judged by the goals."""

SECONDS, TOY_SECONDS = 0.4, 0.05
BY = " by "
OTHERS: Mapping[str, Mapping[str, str]] = {
    "linear int8": {"int_mm": " bias "},
    "linear fp8": {"triton": "", "triton-w8a16": "", "dequantise": " bias "},
}
"""Beginnings of cases that are also run by other implementations than the planned one, and the word that such a case
must have: torch's products are one for all epilogues."""


def cases(toy: bool) -> tuple[str, ...]:
    """``OP CASE`` of all cases, then those of :data:`OTHERS` with ``by IMPLEMENTATION``.

    For a toy the first case of each op, which is the smallest.
    """
    found = [f"{op} {name}" for op in ops.names() for name in list(ops.cases(op))[: 1 if toy else None]]
    return (*found, *(() if toy else _others(found)))


def _others(found: Sequence[str]) -> Iterator[str]:
    for case in found:
        for start, names in OTHERS.items():
            if case.startswith(start):
                yield from (f"{case}{BY}{name}" for name, word in names.items() if word in case)


def kernels(toy: bool) -> Run:
    """What checks and times a case."""
    device = pick_device(toy)

    def run(case: str) -> Iterator[Line]:
        words, _, implementation = case.partition(BY)
        op, _, name = words.partition(" ")
        with ops.pinned(implementation):
            yield measure(op, name, device, TOY_SECONDS if toy else SECONDS)

    return run


def measure(op: str, name: str, device: torch.device, seconds: float) -> Line:
    """Error and bound, and the times where the result is right; a wrong result costs no other case.

    Args:
        op: name of the op.
        name: of its case.
        device: where it runs.
        seconds: what the timed rounds may take.
    """
    try:
        case, checked = ops.check(op, name, device)
    except KernelError as error:
        return {"op": op, "passed": False, "reason": str(error)}
    # The line's case has the op in it, and whom it is run by.
    line = {key: value for key, value in checked.items() if key != "case"}
    line |= ops.timings(case, device, seconds) | {"passed": True}
    return {**line, **judge(case.limit, line["fraction_of_limit"], line["limit_seconds"])}


def judge(limit: str, fraction: float, limit_seconds: float) -> Line:
    """The goal of a kind of limit, and whether a case reaches it; None where it is too short to be judged."""
    return {"goal": GOALS[limit], "reached": None if limit_seconds < JUDGED_SECONDS else fraction >= GOALS[limit]}


if __name__ == "__main__":
    serve(kernels)
