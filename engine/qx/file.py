"""A job file: one safetensors file of raw hidden states and encoded parts, with a header that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..given import Given
from ..vl import BlendKnobs, Knobs, RawExtraction

Kind = Literal["z-image", "qwen-image-edit"]


@dataclass(frozen=True, eq=False)
class JobFile:
    """What a job file holds.

    Attributes:
        kind: the family of models that it is for.
        raw: hidden states of pictures before any knob; None where no picture was read.
        given: encoded parts: ``prompt_embeds`` of :attr:`prompt` before any blend, ``negative_embeds``, references,
            init and size.
        prompt: what ``given.prompt_embeds`` are of, or what the job is for; None leaves it to the run.
        negative_prompt: likewise.
        knobs: chosen when the file was made; a run may choose others.
        blend: likewise.
        extractor: what read the pictures (``VLEncoder.identity`` without the device), and its base name.
        model: what encoded ``given``: its base name, variant and fingerprint.
        render: options of the run that the file was made for, JSON values by the names of the request's fields.
        written: date, ISO 8601; None takes now when it is written.
    """

    kind: Kind = "z-image"
    raw: RawExtraction | None = None
    given: Given = field(default_factory=Given)
    prompt: str | None = None
    negative_prompt: str | None = None
    knobs: Knobs = field(default_factory=Knobs)
    blend: BlendKnobs = field(default_factory=BlendKnobs)
    extractor: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    render: Mapping[str, Any] = field(default_factory=dict)
    written: str | None = None


def write_job(path: str | Path, job: JobFile) -> None:
    """Write a job file, whole or not at all."""
    raise NotImplementedError


def read_job(path: str | Path) -> JobFile:
    """Read a job file and check everything in it."""
    raise NotImplementedError
