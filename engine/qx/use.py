"""From hidden states and knobs to the conditioning of a run, the same for a file and for one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RequestError
from ..vl import (
    EXPERIMENTAL,
    MAX_CAPTION_ROWS,
    BlendKnobs,
    Knobs,
    RawExtraction,
    Statistics,
    blend_report,
    compress_rows,
    condition,
)
from ..vl import blend as blend_rows
from ..vl.condition import advice
from .job import JobFile

if TYPE_CHECKING:
    from ..request import GenerateRequest
    from ..session import Engine


def blended(
    raw: RawExtraction,
    knobs: Knobs,
    blend: BlendKnobs,
    text_embeds: torch.Tensor | None,
    statistics: Statistics | str | Path | None = None,
    *,
    limit: int = MAX_CAPTION_ROWS,
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Conditioning of a picture with a prompt, on the CPU: select and normalise, blend, compress.

    Args:
        raw: of the picture.
        knobs: from hidden states to embeddings.
        blend: from embeddings to conditioning.
        text_embeds: [T, D] of the prompt; None takes the picture alone, which needs alpha 1.
        statistics: for ``per_dim``, ``hybrid`` and masking; None takes those in the cache.
        limit: most rows that the transformer takes.

    Returns:
        [T', D] in the dtype of the text, or of the picture where there is no text; and what the user should hear.

    Raises:
        RequestError: a layer, statistics or the prompt is missing, widths differ, or a setting is out of range.
    """
    if text_embeds is None:
        _check_alone(blend)
        rows = condition(raw, knobs, statistics=statistics).embeddings
        notes = [f"no prompt: {len(rows)} rows of the picture alone"]
    else:
        text = text_embeds.detach().cpu()
        picture = condition(raw, knobs, statistics=statistics, text_embeds=text).embeddings
        rows = blend_rows(picture, text, blend)
        notes = blend_report(text, picture, rows)
    made = compress_rows(rows, limit, blend.compression)
    if len(made) < len(rows):
        notes.append(f"conditioning of {len(rows)} rows brought to {len(made)} ({blend.compression})")
    return made, (EXPERIMENTAL, *advice(knobs), *notes)


def request_of(job: JobFile, values: Mapping[str, Any], engine: Engine) -> GenerateRequest:
    """What a run makes of a job file.

    Args:
        job: as read.
        values: fields of the request, of ``Knobs`` and of ``BlendKnobs`` by their names, and ``statistics``; they win
            over ``job.render``, which wins over the job's knobs.
        engine: the opened model.
    """
    raise NotImplementedError


def _check_alone(blend: BlendKnobs) -> None:
    if blend.alpha != 1 or blend.alphas is not None:
        raise RequestError(
            f"prompt must be given where the picture's share is below 1, got none at alpha {blend.alpha:g}",
            hint="add --prompt, or take the picture alone with --alpha 1",
        )
