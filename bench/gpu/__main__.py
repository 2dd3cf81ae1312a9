"""``python -m qengine.bench.gpu``: gather all GPU evidence in one run, as JSON lines written while it goes."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...errors import DeviceError, QEngineError
from ...version import __version__
from . import ahead, engine, kernels, probes, rival, zimage
from .table import table
from .watch import Stage, watch

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "gpu.jsonl"
PACKAGES = ("torch", "triton", "diffusers", "accelerate", "transformers", "numpy")
DEADLINE_SECONDS = 520.0
LIMITS = {"probes": 60.0, "kernels": 40.0, "engine": 100.0, "zimage": 40.0, "rival": 130.0, "ahead": 60.0}
SHARES = {"probes": 50.0, "kernels": 110.0, "engine": 190.0, "zimage": 60.0, "rival": 110.0, "ahead": 60.0}

TOY_PATIENCE = 5.0
"""A toy is run by tests, beside other work, and may take so many times as long."""


def stages(toy: bool) -> tuple[Stage, ...]:
    """Everything that is run, in order; each rival gets a process of its own."""
    cases = {
        "probes": probes.CASES,
        "kernels": kernels.cases(toy),
        "engine": engine.TOY_CASES if toy else engine.CASES,
        "zimage": zimage.TOY_CASES if toy else zimage.CASES,
    }
    made = [_stage(name, found, toy) for name, found in cases.items()]
    rivals = [_stage("rival", (case,), toy) for case in (rival.CASES[:3] if toy else rival.CASES)]
    # Last, for it needs no card: what is left of the time is enough or the lines can be had elsewhere.
    return (*made, *rivals, _stage("ahead", ahead.cases(toy), toy))


def _stage(name: str, cases: tuple[str, ...], toy: bool) -> Stage:
    command = (sys.executable, "-m", f"{__package__}.{name}", *(["--toy"] if toy else []))
    patience = TOY_PATIENCE if toy else 1.0
    return Stage(name, command, cases, patience * LIMITS[name], patience * SHARES[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages.

    Args:
        argv: the options; None takes them from the process.

    Returns:
        0 when anything was measured, else 1.

    Raises:
        DeviceError: there is no CUDA device, and no toy was asked for.
    """
    parser = argparse.ArgumentParser(prog="python -m qengine.bench.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="append the lines to this file")
    parser.add_argument("--toy", action="store_true", help="the same at toy size on the CPU")
    parser.add_argument("--deadline", type=float, default=DEADLINE_SECONDS, help="seconds for everything")
    parser.add_argument("--only", nargs="*", choices=sorted(LIMITS), help="stages to run")
    parser.add_argument("--commit", help="what to record where there is no git checkout")
    options = parser.parse_args(argv)
    if not options.toy and not torch.cuda.is_available():
        raise DeviceError("a CUDA device must be there, got none", hint="--toy runs everything at toy size on the CPU")
    start = time.monotonic()
    chosen = [stage for stage in stages(options.toy) if not options.only or stage.name in options.only]
    record = Record(options.json, start)
    record.write(head(options.commit, toy=options.toy))
    for stage in chosen:
        watch(stage, start + options.deadline, record.write)
    record.write({"stage": "run", "case": "end", "status": "ok"})
    sys.stdout.write(table(record.lines) + "\n")
    return 0 if any(line["status"] == "ok" and line["stage"] != "run" for line in record.lines) else 1


class Record:
    """Lines that are in the file as soon as they are known.

    Args:
        path: appended to; its folder is made.
        start: moment of ``time.monotonic`` at which the run began.
    """

    def __init__(self, path: Path, start: float) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._start = path, start
        self._run = datetime.now(UTC).isoformat(timespec="seconds")
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, with the run that it belongs to and the seconds since its start."""
        whole = {"run": self._run, "at_seconds": round(time.monotonic() - self._start, 1), **line}
        self.lines.append(whole)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole) + "\n")
        words = [str(whole.get(key)) for key in ("at_seconds", "stage", "case", "status")]
        sys.stderr.write(" ".join([*words, str(whole.get("reason", ""))]).rstrip() + "\n")


def head(commit: str | None, *, toy: bool) -> dict[str, Any]:
    """The first line of a run: machine, versions and commit."""
    found = {name: metadata.version(name) for name in PACKAGES if find_spec(name) is not None}
    return {
        "stage": "run",
        "case": "begin",
        "status": "ok",
        "toy": toy,
        "machine": {"system": platform.platform(), "processor": platform.machine(), "python": sys.version.split()[0]},
        "versions": {"qengine": __version__, **found},
        "commit": commit or _commit(),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    try:
        code = main()
    except QEngineError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    sys.exit(code)
