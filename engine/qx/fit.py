"""Whether a job file goes with a model, and what the user should hear where it only just does."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, RequestError
from ...loaders.source import ModelSource
from ...loaders.variant import ZIMAGE
from ...loaders.vl import vocabulary_sha256
from .job import JobFile


def check_model(job: JobFile, source: ModelSource) -> None:
    """Check kind and width.

    Raises:
        CheckpointError: the model is of another kind, or takes conditioning of another width.
    """
    zimage = source.variant in ZIMAGE
    if zimage != (job.kind == "z-image"):
        raise CheckpointError(
            f"model must be of the kind that the job file is for, {job.kind}, got {source.variant}",
            hint="name another with --model",
        )
    if not zimage:
        return
    width = source.transformer.config["cap_feat_dim"]
    states = [] if job.raw is None else list(job.raw.hidden.values())
    found = {each.shape[1] for each in states}
    if found - {width}:
        raise CheckpointError(
            f"model must take conditioning of the width in the job file, {found.pop()}, got {width}",
            hint="read the pictures with the Qwen3-VL whose hidden size the model takes",
        )


def check_made_by(job: JobFile, source: ModelSource, what: str) -> None:
    """Check that the model is the one that encoded parts of a job.

    Raises:
        CheckpointError: it is another.
    """
    made = job.model.get("fingerprint")
    if made != source.fingerprint:
        raise CheckpointError(
            f"model must be the one that encoded {what} in the job file, {job.model.get('label')} ({made!s:.12}), "
            f"got {source.label} ({source.fingerprint:.12})",
            hint="name that one with --model, or extract again with this one",
        )


def template_notes(job: JobFile, source: ModelSource) -> tuple[str, ...]:
    """Where picture and prompt were not read alike."""
    notes = []
    known = job.extractor.get("vocabulary")
    if known is not None and known != vocabulary_sha256(source.tokenizer_dir):
        notes.append("the tokenizer that read the picture and the prompt's have different vocabularies")
    if job.raw is not None and (job.raw.think_block or job.raw.variant == "thinking"):
        notes.append("the picture was read with a think block, the prompt is encoded without one")
    return tuple(notes)


def picture_notes(job: JobFile, init: Any) -> tuple[str, ...]:
    """Where the picture that is read and the one that the run starts from differ."""
    if job.raw is None or not job.raw.pictures:
        return ()
    start = None
    if isinstance(init, str | PathLike):
        start = _sha256(Path(init))
    elif init is None and job.given.init is not None and job.pictures:
        start = job.pictures[-1].sha256
    if start is None or start in {seen.sha256 for seen in job.raw.pictures}:
        return ()
    return ("the picture that the run starts from is not the one that was read; results may clash",)


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"init_image must be a readable file, got {path}: {error.strerror or error}") from error
