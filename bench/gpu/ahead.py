"""What the compiler says of every kernel configuration for this card: registers, spills and shared memory.

Compiled in processes of their own, since a process in which Triton interprets its kernels cannot compile them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ...kernels import ahead as compiler
from .worker import Line, Run, serve

TOY_ARCHITECTURE = 90


def cases(toy: bool) -> tuple[str, ...]:
    """Names of the ops that have Triton kernels; the first for a toy."""
    return compiler.ops()[: 1 if toy else None]


def ahead(toy: bool) -> Run:
    """What compiles the kernels of an op for the compute capability of this card."""
    major, minor = divmod(TOY_ARCHITECTURE, 10) if toy else torch.cuda.get_device_capability()

    def run(op: str) -> Iterator[Line]:
        yield from compiled(op, 10 * major + minor)

    return run


def compiled(op: str, architecture: int) -> list[dict[str, Any]]:
    """Lines of ``qengine.kernels.ahead`` for an op.

    Args:
        op: name of the op.
        architecture: compute capability, 86 for 8.6.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    command = [sys.executable, "-m", compiler.__name__, op, "--cc", str(architecture)]
    # The path is handed on as it is here: the package may not be installed.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode and not any(line["spill_bytes"] for line in lines):
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return lines


if __name__ == "__main__":
    serve(ahead)
