"""``qengine render`` with the fake engine and job files of JSON; as a script it runs the command line with them."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine, replacements  # noqa: E402
from qengine.errors import CheckpointError, InputError  # noqa: E402


@dataclass(frozen=True)
class FakeJob:
    render: dict[str, Any] = field(default_factory=dict)


def read_job(path: Path) -> FakeJob:
    try:
        return FakeJob(json.loads(path.read_text()))
    except ValueError as error:
        raise InputError(f"{path} must be a job file, got: {error}") from error


def prepare(job: FakeJob, values: dict[str, Any], engine: FakeEngine) -> Any:
    from qengine.engine.request import GenerateRequest

    fields = {**job.render, **values}
    model = fields.pop("model", None)
    if model not in (None, engine.source.label):
        raise CheckpointError(f"the job must be for {engine.source.label}, got {model}")
    return SimpleNamespace(request=GenerateRequest(**fields), notes=(), record={})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from qengine.cli import backend, main, render

    for name, value in replacements(FakeEngine()).items():
        setattr(backend, name, value)
    render.read_job, render.prepare = read_job, prepare
    render.POLL_SECONDS = 0.02
    sys.exit(main())
