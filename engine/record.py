"""The record of a run that goes into its output and from which the run can be repeated."""

from __future__ import annotations

from typing import Any

import torch

from ..loaders import ModelSource
from ..version import __version__
from .job import Job
from .plan import Plan

FORMAT = 1


def numerics(plan: Plan) -> dict[str, str]:
    """The recorded choices that decide bits beside request, model and device: formats, kernels, devices, tile.

    Placement is not among them: it never changes a bit; nor is what quantises, which writes the same bytes in every
    implementation. ``attention`` and ``pinned`` are what was asked for, ``kernels`` is what ran.
    """
    return {
        "weights": plan.formats.transformer,
        "kernels": " ".join(f"{op}={made}" for op, made in plan.kernels.items() if not op.endswith("quant")),
        "attention": plan.attention,
        "pinned": " ".join(f"{op}={made}" for op, made in plan.pinned.items()),
        "text_encoder_weights": plan.formats.encoder,
        "vae_weights": plan.formats.vae,
        "text_encoder_device": plan.phase("encode").device,
        "vae_tile": "" if plan.cut.tile_pixels is None else str(plan.cut.tile_pixels),
    }


def describe(job: Job, source: ModelSource, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """JSON values that fix a run: request with every number resolved, model, pictures, device, versions."""
    return {
        "format": FORMAT,
        "qengine": __version__,
        "kind": job.kind,
        "model": {"label": source.label, "variant": source.variant, "fingerprint": source.fingerprint},
        "request": job.record(),
        "inputs": [{"path": picture.label, "sha256": picture.sha256} for picture in job.pictures],
        "device": plan.device.kind,
        "numerics": numerics(plan),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
