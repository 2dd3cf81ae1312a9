"""The work of ``qengine extract``: read with one model, encode with another. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.qx import JobFile, blended
from ..engine.qx.fit import picture_notes
from ..engine.qx.make import encoded, extractor_words
from ..engine.vl import EXPERIMENTAL, BlendKnobs, Knobs, condition, likeness, report
from ..engine.vl.stats import read_statistics as read_statistics
from ..errors import CheckpointError, RequestError
from ..loaders.variant import ZIMAGE
from ..loaders.vl import open_vl
from . import backend
from .blend import blend_of, knobs_of, open_extractor, told
from .memory import memory_choice
from .meter import PackMeter
from .order import device_choice, model_choice, request_fields
from .progress import Talk
from .words import seconds_text
from .zimage import starting

if TYPE_CHECKING:
    from ..engine.request import GenerateRequest
    from ..engine.vl import RawExtraction, VLEmbeddingExtractor
    from .extract import Wanted

Values = Mapping[str, Any]

check_picture = backend.check_picture


def settings(values: Values) -> tuple[Knobs, BlendKnobs, tuple[int, ...]]:
    """Knobs that the file carries, and the layers that it holds.

    Several layers without weights are several to choose from later, of which the first is the file's own choice; with
    weights they are a mean.
    """
    knobs, blend = knobs_of(values), blend_of(values)
    layers = knobs.layers
    if len(layers) > 1 and not any(":" in word for word in values["hidden_layer"]):
        knobs = replace(knobs, hidden_layer=layers[0])
    return knobs, blend, layers


def check_pair(values: Values) -> None:
    """Check by their headers that a model takes what another reads.

    Raises:
        CheckpointError: it is of another kind or width, or one of them is missing or damaged.
    """
    choice = model_choice(values)
    source, reader = backend.open_source(**choice), open_vl(values["vl_model"])
    if source.variant not in ZIMAGE:
        raise CheckpointError(
            f"model beside --vl-model must be a Z-Image, got {source.variant}", hint="leave one of them out"
        )
    width = source.transformer.config["cap_feat_dim"]
    if reader.hidden_size != width:
        raise CheckpointError(
            f"hidden size of --vl-model must be the width that the model takes, {width}, got {reader.hidden_size}",
            hint="Z-Image takes Qwen3-VL-4B",
        )


def read(wanted: Wanted, values: Values, layers: tuple[int, ...], talk: Talk) -> JobFile:
    """Raw hidden states of the pictures; the model is freed again."""
    start = time.perf_counter()
    talk.display.start("read")
    extractor = open_extractor(values)
    try:
        source = extractor.source
        job = read_with(extractor, wanted, values, layers)
    finally:
        extractor.unload()
    took = seconds_text(time.perf_counter() - start)
    device = extractor.encoder.identity["device"]
    name = source.folder.resolve().name
    talk.display.end(f"{name} ({source.variant}), {device}, {job_layers(layers)}  {took}, then freed")
    for note in told(extractor, values):
        talk.warn(note)
    return job


def job_layers(layers: tuple[int, ...]) -> str:
    """``layer -6`` or ``layers -2, -6``."""
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def read_with(extractor: VLEmbeddingExtractor, wanted: Wanted, values: Values, layers: tuple[int, ...]) -> JobFile:
    """Raw hidden states of the pictures by an opened model."""
    raw = raw_of(extractor, wanted.pictures, values, layers)
    return JobFile(raw=raw, extractor=extractor_words(extractor), prompt=wanted.prompt)


def raw_of(
    extractor: VLEmbeddingExtractor, pictures: Sequence[Path], values: Values, layers: tuple[int, ...]
) -> RawExtraction:
    """What an opened model sees in pictures, as the flags say.

    Raises:
        RequestError: how tokens are masked is said, and not which.
    """
    masked = tuple(values["mask_tokens"])
    if values["mask_mode"] is not None and not masked:
        raise RequestError("--mask-mode must stand beside --mask-tokens, got it alone")
    return extractor.raw(
        list(pictures),
        values["text"],
        layers,
        system_prompt=values["system_prompt"],
        think_block=values["think"],
        mask_tokens=masked,
        mask_mode=values["mask_mode"] or "attention",
    )


def encode(wanted: Wanted, values: Values, talk: Talk) -> JobFile:
    """Prompt, negative prompt, and latents of the pictures; the model is freed again."""
    packing = PackMeter(talk)
    choice = {**model_choice(values), **device_choice(values), **memory_choice(values)}
    with backend.cancelling(backend.open_engine(packing, **choice)) as engine:
        start = time.perf_counter()
        packing.phase = "encode"
        talk.display.start("encode")
        job = encoded(engine, request_of(wanted, values))
        took = seconds_text(time.perf_counter() - start)
        talk.display.end(f"{engine.source.label} ({engine.source.variant}), {engine.device.type}  {took}, then freed")
        return job


def request_of(wanted: Wanted, values: Values) -> GenerateRequest:
    """What is to be rendered: an edit of the pictures, unless another model reads them."""
    fields = {"prompt": wanted.prompt, **request_fields(values), **starting(values)}
    edit = bool(wanted.pictures) and not wanted.reads
    return backend.make_request("edit" if edit else "generate", fields, wanted.pictures if edit else (), 0)


def render_of(values: Values, job: JobFile) -> dict[str, Any]:
    """Options of the run that were said here, but for what the file holds by itself."""
    own = {"negative_prompt", "init_image", "prompt"}
    said = {**request_fields(values), **starting(values)}
    if job.given.size not in (None, said.get("size")):
        own.add("size")
    fields = {name: value for name, value in said.items() if name not in own}
    if values["negative_prompt"] is not None and job.given.prompt_embeds is None:
        fields["negative_prompt"] = values["negative_prompt"]
    seed = {} if values["seed"] is None else {"seed": values["seed"]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in (fields | seed).items()}


def numbers(job: JobFile, statistics: str | None) -> list[str]:
    """Sizes and standard deviations, raw, by the knobs, and of the blend where the prompt is encoded."""
    if job.raw is None:
        return []
    lines = [f"note: {note}" for note in (EXPERIMENTAL, *picture_notes(job, None))] + report(job.raw)
    text = job.given.prompt_embeds
    try:
        made = condition(job.raw, job.knobs, statistics=statistics, text_embeds=text)
    except RequestError as error:
        return [*lines, f"note: what the knobs make of it is measured by the run: {error.message}"]
    known = {*lines, EXPERIMENTAL}
    lines += [line for line in report(made) if line not in known]
    if text is not None:
        _, notes = blended(job.raw, job.knobs, job.blend, text, statistics)
        lines.append(likeness(text, made.embeddings))
        lines += [note for note in notes if note != EXPERIMENTAL and f"note: {note}" not in lines]
    return lines


def draw(job: JobFile, statistics: str | None, path: Path) -> None:
    """The picture of what was read."""
    from ..engine.vl.plot import draw_report

    if job.raw is None:
        return
    text = job.given.prompt_embeds
    rows = None if text is None else blended(job.raw, job.knobs, job.blend, text, statistics)[0]
    draw_report(job.raw, job.knobs, statistics, path, blended=rows, text_embeds=text)
