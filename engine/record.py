"""The record of a run that goes into its output and from which the run can be repeated."""

from __future__ import annotations

from typing import Any

import torch

from ..loaders import ModelSource
from ..version import __version__
from .job import Job

FORMAT = 1


def describe(job: Job, source: ModelSource, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """JSON values that fix a run: request with every number resolved, model, pictures, device, versions."""
    return {
        "format": FORMAT,
        "qengine": __version__,
        "kind": job.kind,
        "model": {"label": source.label, "variant": source.variant, "fingerprint": source.fingerprint},
        "request": job.record(),
        "inputs": [{"path": picture.label, "sha256": picture.sha256} for picture in job.pictures],
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
