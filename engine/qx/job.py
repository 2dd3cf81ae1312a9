"""What a job file holds, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..given import Given
from ..vl import BlendKnobs, Knobs, RawExtraction, Seen

Kind = Literal["z-image", "qwen-image-edit"]
AGAIN = 'make it with: qengine extract --image REF --vl-model QWEN3VL --text "…" -o job.qx'


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
        pictures: behind the references, first to last, or behind init.
        knobs: chosen when the file was made; a run may choose others.
        blend: likewise.
        extractor: what read the pictures: its base name and ``VLEncoder.identity`` without the device.
        model: what encoded ``given``: its base name, variant, fingerprint, compute dtype and weight formats.
        render: options of the run that the file was made for, JSON values by the names of the request's fields.
        written: date, ISO 8601; None takes now when it is written.
        sha256: of the file as it was read; empty before.
    """

    kind: Kind = "z-image"
    raw: RawExtraction | None = None
    given: Given = field(default_factory=Given)
    prompt: str | None = None
    negative_prompt: str | None = None
    pictures: tuple[Seen, ...] = ()
    knobs: Knobs = field(default_factory=Knobs)
    blend: BlendKnobs = field(default_factory=BlendKnobs)
    extractor: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    render: Mapping[str, Any] = field(default_factory=dict)
    written: str | None = None
    sha256: str = ""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name as they are stored, on the CPU."""
        made: dict[str, torch.Tensor | None] = {}
        if self.raw is not None:
            made = {f"vl.hidden.{layer}": states for layer, states in self.raw.hidden.items()}
            made |= {
                "vl.input_ids": self.raw.input_ids,
                "vl.segment": self.raw.segments,
                "vl.grid_thw": self.raw.grid_thw,
            }
        given = self.given
        made |= {"text.embeds": given.prompt_embeds, "neg.embeds": given.negative_embeds, "latent.init": given.init}
        made |= {f"latent.ref.{number}": latents for number, latents in enumerate(given.references)}
        return {name: tensor.detach().cpu().clone() for name, tensor in made.items() if tensor is not None}
