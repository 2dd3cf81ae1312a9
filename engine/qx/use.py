"""From hidden states and knobs to the conditioning of a run, the same for a file and for one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RequestError
from ..given import Given
from ..request import EditRequest, GenerateRequest
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
from ..zimage.config import ZImageConfig
from .fit import check_made_by, check_model, picture_notes, template_notes
from .job import JobFile
from .settings import Settings, knob_words, settle

if TYPE_CHECKING:
    from ..session import Engine

ALONE = "(the picture alone)"
"""Stands for the prompt where there is none."""


@dataclass(frozen=True)
class Prepared:
    """A job file made ready for a run.

    Attributes:
        request: for ``Engine.stream``.
        notes: what the user should hear.
        record: for the metadata of the picture: hash of the file, knobs, what read and encoded.
    """

    request: GenerateRequest
    notes: tuple[str, ...]
    record: Mapping[str, Any]


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
        if not _alone(blend):
            raise _no_prompt(blend)
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
    """What a run makes of a job file; see :func:`prepare`."""
    return prepare(job, values, engine).request


def prepare(job: JobFile, values: Mapping[str, Any], engine: Engine) -> Prepared:
    """A job file and settings to a request whose given parts are those of the file, blended anew.

    Args:
        job: as read.
        values: fields of the request, of ``Knobs`` and of ``BlendKnobs`` by their names, and ``statistics``; they win
            over ``job.render``, and both win over the job's knobs.
        engine: the opened model; where the prompt is not the file's, it encodes it.

    Raises:
        RequestError: the prompt is missing, a value is unknown or out of range, or does not go with what is encoded.
        CheckpointError: the job is for another kind of model, another width, or was encoded by another model.
    """
    settings = settle(job, values)
    check_model(job, engine.source)
    if job.kind == "qwen-image-edit":
        return _edit(job, settings, engine)
    prompt = check_prompt(job, settings)
    embeds, negative = _text(job, settings, prompt, engine)
    notes: tuple[str, ...] = ()
    if job.raw is not None:
        limit = ZImageConfig.from_dict(engine.source.transformer.config).caption_limit
        embeds, notes = blended(job.raw, settings.knobs, settings.blend, embeds, settings.statistics, limit=limit)
        notes += template_notes(job, engine.source)
    init = None if "init_image" in settings.fields else job.given.init
    if init is not None:
        check_made_by(job, engine.source, "latent.init")
        _check_size(settings, job)
    given = Given(embeds, negative, init=init, size=None if init is None else job.given.size)
    request = GenerateRequest(**{**settings.fields, "prompt": prompt or ALONE, "given": given})
    return Prepared(request, (*notes, *picture_notes(job, settings.fields.get("init_image"))), _record(job, settings))


def check_prompt(job: JobFile, settings: Settings) -> str | None:
    """The prompt that is said, or the file's; None where the picture is taken alone.

    Raises:
        RequestError: there is none and the picture's share is below 1.
    """
    prompt = settings.fields.get("prompt", job.prompt)
    if prompt is None and (job.raw is None or not _alone(settings.blend)):
        raise _no_prompt(settings.blend)
    return prompt


def _edit(job: JobFile, settings: Settings, engine: Engine) -> Prepared:
    """An edit whose prompt, negative and references are all the file's: they were encoded together."""
    check_made_by(job, engine.source, "what is encoded")
    for name, own in (("prompt", job.prompt), ("negative_prompt", _negative(job.negative_prompt, engine))):
        asked = settings.fields.get(name, own)
        if (asked if name == "prompt" else _negative(asked, engine)) != own:
            raise RequestError(
                f"{name} must be the job file's {own!r}, which was encoded with the pictures, got {asked!r}",
                hint="extract again with another one",
            )
    _check_size(settings, job)
    own = {"prompt": job.prompt, "negative_prompt": job.negative_prompt, "given": job.given}
    known = {name: value for name, value in own.items() if value is not None}
    return Prepared(EditRequest(**{**settings.fields, **known, "images": ()}), (), _record(job, settings))


def _text(
    job: JobFile, settings: Settings, prompt: str | None, engine: Engine
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Embeddings of the prompt and the negative prompt, of the file where it has them of these words."""
    if prompt is None:
        return None, None
    negative = settings.fields.get("negative_prompt", job.negative_prompt)
    if job.given.prompt_embeds is not None and prompt == job.prompt:
        check_made_by(job, engine.source, "text.embeds")
        same = _negative(negative, engine) == _negative(job.negative_prompt, engine)
        return job.given.prompt_embeds, job.given.negative_embeds if same else None
    fields = {name: value for name, value in settings.fields.items() if name not in ("init_image", "strength")}
    found = engine.encode(GenerateRequest(**{**fields, "prompt": prompt})).conditioning
    made = found.prompt_embeds, found.negative_embeds
    return made[0].cpu(), None if made[1] is None else made[1].cpu()


def _negative(said: str | None, engine: Engine) -> str | None:
    """The negative prompt that is meant: the model's own where none is said."""
    return engine.defaults.negative_prompt if said is None else said


def _alone(blend: BlendKnobs) -> bool:
    return blend.alpha == 1 and blend.alphas is None


def _no_prompt(blend: BlendKnobs) -> RequestError:
    return RequestError(
        f"prompt must be given where the picture's share is below 1, got none at alpha {blend.alpha:g}",
        hint="add --prompt, or take the picture alone with --alpha 1",
    )


def _check_size(settings: Settings, job: JobFile) -> None:
    asked = settings.fields.get("size")
    if asked is not None and asked != job.given.size:
        own = "x".join(map(str, job.given.size or ()))
        raise RequestError(
            f"size must be {own} as the latents in the job file, got {asked[0]}x{asked[1]}",
            hint="leave --size out, or extract again with it",
        )


def _record(job: JobFile, settings: Settings) -> dict[str, Any]:
    words: dict[str, Any] = {"sha256": job.sha256, "extractor": job.extractor.get("label")}
    if job.raw is not None:
        words |= {"knobs": knob_words(settings.knobs), "blend": knob_words(settings.blend)}
        words["pictures"] = [seen.sha256 for seen in job.raw.pictures]
        words["alone"] = settings.fields.get("prompt", job.prompt) is None
    return words
