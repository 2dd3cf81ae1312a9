"""Jobs of the tiny random models, for tests of their files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from qengine.engine.given import Given
from qengine.engine.qx.job import JobFile
from qengine.engine.vl import RawExtraction, Seen
from vlpipelines import picture, shared

DATE = "2026-01-02T03:04:05+00:00"


@cache
def raw_of(pictures: int = 1, layers: tuple[int, ...] = (-6, -2), mode: str | None = None) -> RawExtraction:
    """What the shared tiny Qwen3-VL sees in smooth pictures of several sizes."""
    seen = [picture(96 + 64 * number, 64, number) for number in range(pictures)]
    masked: dict[str, Any] = {} if mode is None else {"mask_tokens": (1, 2), "mask_mode": mode}
    return shared().raw(seen, "eating spaghetti", layers, system_prompt="be brief", **masked)


def given_of(seed: int = 0, references: int = 0, init: bool = False, width: int = 64) -> Given:
    """Random encoded parts."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(1, 16, 1, 4, 6, generator=generator) for _ in range(references + init)]
    return Given(
        prompt_embeds=torch.randn(11, width, generator=generator),
        negative_embeds=torch.randn(8, width, generator=generator),
        references=tuple(latents[:references]),
        init=latents[-1] if init else None,
        size=(48, 32) if latents else None,
    )


def job_of(**changes: Any) -> JobFile:
    """A Z-Image job with one picture, its prompt and an initial picture."""
    job = JobFile(
        raw=raw_of(),
        given=given_of(init=True),
        prompt="Homer Simpson",
        pictures=(Seen("ab" * 32, 50, 30),),
        extractor={"label": "tiny-vl", "dtype": "float32"},
        model={"label": "tiny-z", "fingerprint": "cd" * 32},
        written=DATE,
    )
    return replace(job, **changes)
