"""From pictures and prompts to a job: what reads first is freed before what encodes is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ...loaders.variant import ZIMAGE
from ...loaders.vl import vocabulary_sha256
from ..picture import load_picture
from ..request import EditRequest, GenerateRequest
from ..vl import Seen
from .job import JobFile
from .remote import base_name

if TYPE_CHECKING:
    from PIL import Image

    from ..session import Engine
    from ..vl import VLEmbeddingExtractor


def extractor_words(extractor: VLEmbeddingExtractor) -> dict[str, Any]:
    """What read the pictures, without device and path."""
    identity = {name: value for name, value in extractor.encoder.identity.items() if name != "device"}
    source = extractor.source
    return {"label": source.folder.resolve().name, "vocabulary": vocabulary_sha256(source.folder), **identity}


def encoded(engine: Engine, request: GenerateRequest, render: Mapping[str, Any] | None = None) -> JobFile:
    """A job of what an engine encodes of a request: prompt, negative prompt, references or the initial picture.

    Args:
        engine: the opened model.
        request: what is to be made elsewhere.
        render: options of the run that the file is made for.

    Raises:
        RequestError: the model is one that no job file is for, or does not do what is asked.
    """
    source = engine.source
    edit = isinstance(request, EditRequest)
    if not edit and source.variant not in ZIMAGE:
        raise RequestError(
            f"a job file must be of Z-Image or of an edit, got a picture from text alone with {source.variant}",
            hint="name a picture to edit, or another model",
        )
    formats = engine.plan(request).formats
    given = engine.extract(request)
    return JobFile(
        kind="qwen-image-edit" if edit else "z-image",
        given=given,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        pictures=_seen(request),
        model={
            "label": base_name(source.label),
            "variant": source.variant,
            "fingerprint": source.fingerprint,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "text_encoder_weights": formats.encoder,
            "vae_weights": formats.vae,
        },
        render=dict(render or {}),
    )


def _seen(request: GenerateRequest) -> tuple[Seen, ...]:
    shown: Sequence[Image.Image | str | PathLike[str]] = ()
    if isinstance(request, EditRequest):
        shown = request.images
    elif request.init_image is not None:
        shown = (request.init_image,)
    loaded = [load_picture(Path(each) if isinstance(each, str) else each) for each in shown]
    return tuple(Seen(each.sha256, each.image.width, each.image.height) for each in loaded)
