"""The flow of ``edit``, ``generate`` and ``rerun``: check, open, run, write, report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from . import backend
from .meter import PackMeter, ReadMeter
from .order import Order, check_files
from .outputs import Target, check_preview_folder, choose
from .progress import StepClock, Talk, memory_words
from .words import bytes_text, cost, cost_text, seconds_text

if TYPE_CHECKING:
    from ..engine.events import Decoded
    from ..engine.request import GenerateRequest
    from ..engine.session import Engine

TINY_WORDS = "model    the tiny model inside qengine, for simple photo edits; --model names another"


@dataclass(frozen=True)
class Item:
    """One picture to make: what is asked, where it goes, and what its metadata says beside the engine's record."""

    request: GenerateRequest
    target: Target
    record: Mapping[str, Any] = field(default_factory=dict)


def carry_out(order: Order, talk: Talk) -> int:
    """Do an order; returns the exit code.

    Everything that can be wrong without the model is found before the model is opened.
    """
    check_files(order.pictures)
    targets = choose(order.wish, order.seeds)
    if order.preview is not None:
        check_preview_folder(order.preview)
    requests = [backend.make_request(order.kind, order.request, order.images, seed) for seed in order.seeds]
    for path in order.pictures:
        backend.check_picture(path)
    items = [Item(request, target) for request, target in zip(requests, targets, strict=True)]
    try:
        results = _run_all(order, items, talk)
    finally:
        talk.display.close()
    if order.as_json:
        print(json.dumps({"outputs": results}, indent=2))
    return 0


def _run_all(order: Order, items: list[Item], talk: Talk) -> list[dict[str, Any]]:
    results, packing = [], PackMeter(talk)
    with backend.cancelling(open_engine(order, talk, packing)) as engine:
        for item in items:
            results.append(run_one(engine, order, item, talk, packing))
    return results


def open_engine(order: Order, talk: Talk, packing: PackMeter) -> Engine:
    """Open the engine of an order and say what was opened.

    Raises:
        CheckpointError: the model is not the one of the recorded run.
    """
    if order.model.get("model") is None and "dit" not in order.model:
        talk.say(TINY_WORDS)
    start = time.perf_counter()
    talk.display.start("open")
    engine = backend.open_engine(packing, **order.model)
    source = engine.source
    size = sum(part.checkpoint.nbytes for part in (source.transformer, source.vae, source.text_encoder))
    took = seconds_text(time.perf_counter() - start)
    talk.display.end(f"{source.label} ({source.variant}), {bytes_text(size)}, {engine.device}, {took}")
    if order.fingerprint is not None and source.fingerprint != order.fingerprint:
        engine.close()
        raise CheckpointError(
            f"model {source.label} must be the one of the recorded run ({order.fingerprint[:12]}), "
            f"got {source.fingerprint[:12]}",
            hint="give the recorded one with --model",
        )
    return engine


def run_one(engine: Engine, order: Order, item: Item, talk: Talk, packing: PackMeter) -> dict[str, Any]:
    """Make one picture and write it; returns what ``--json`` prints of it."""
    start = time.perf_counter()
    with ReadMeter(talk.display, lambda: engine.bytes_read, packing):
        decoded = _watch(engine, order, item, talk, packing)
    metadata = {**_record(decoded.metadata, order), **item.record}
    written = metadata if order.metadata else None
    if item.target.picture is not None:
        backend.write_picture(item.target.picture, decoded.image, written)
    if item.target.latents is not None:
        backend.write_latents(item.target.latents, decoded.latents, written)
    seconds = time.perf_counter() - start
    talk.detail(f"{'request':<8} {json.dumps(metadata['request'])}")
    width, height = decoded.image.size
    seed = metadata["request"]["seed"]
    names = " ".join(str(path) for path in item.target.paths)
    talk.say(f"{'done':<8} {names}  {width}x{height}  seed {seed}  {seconds_text(seconds)}")
    if order.rate is not None:
        talk.say(f"{'cost':<8} {cost_text(seconds, order.rate)}")
    if not order.as_json:
        for path in item.target.paths:
            print(path, flush=True)
    return {
        "image": None if item.target.picture is None else str(item.target.picture),
        "latents": None if item.target.latents is None else str(item.target.latents),
        "width": width,
        "height": height,
        "seed": seed,
        "seconds": round(seconds, 3),
        **({} if order.rate is None else {"cost": cost(seconds, order.rate)}),
        "metadata": metadata,
    }


def _watch(engine: Engine, order: Order, item: Item, talk: Talk, packing: PackMeter) -> Decoded:
    """Run one request and show every phase; returns the picture."""
    device = str(engine.device)
    clock = StepClock(device)
    packing.phase = "encode"
    talk.display.start("encode")
    stream: Iterator[Any] = engine.stream(item.request)
    first: int | None = None
    for event in stream:
        phase = backend.phase_of(event)
        if phase == "encode":
            _tell_encoded(event, clock, talk)
            clock = StepClock(device)
            packing.phase = "denoise"
            talk.display.start("denoise")
        elif phase == "denoise":
            if first is None:
                first = event.index
                talk.display.start("denoise", event.total - first)
            done, count = event.index + 1 - first, event.total - first
            talk.display.step(done, clock.words(done, count))
            _save_preview(event, order, item)
            _save_mask(event, order, item)
            if done == count:
                talk.display.end(f"{count} steps  {seconds_text(clock.seconds)}  {memory_words(device)}".rstrip())
                clock = StepClock(device)
                talk.display.start("decode")
        else:
            if first is None:
                talk.display.end("0 steps")
                talk.display.start("decode")
            talk.display.end(seconds_text(clock.seconds))
            for note in event.notes:
                talk.warn(note)
            return event
    raise RuntimeError("a stream ended without a picture")


def _tell_encoded(event: Any, clock: StepClock, talk: Talk) -> None:
    talk.display.end(seconds_text(clock.seconds) + ("  from the cache" if event.cached else ""))
    for note in event.notes:
        talk.warn(note)


def _save_preview(event: Any, order: Order, item: Item) -> None:
    if order.preview is None:
        return
    digits = len(str(event.total))
    path = Path(order.preview) / f"{item.target.stem}_step{event.index + 1:0{digits}d}.png"
    backend.write_picture(path, event.preview(), None)


def _save_mask(event: Any, order: Order, item: Item) -> None:
    if not order.masks or event.mask is None:
        return
    digits = max(2, len(str(event.total)))
    path = item.target.paths[0].with_name(f"{item.target.stem}_rcm_mask_{event.index:0{digits}d}.png")
    backend.write_mask(path, event)


def _record(metadata: dict[str, Any], order: Order) -> dict[str, Any]:
    """The engine's record, and with single files the names by which ``rerun`` opens them again."""
    names = ("dit", "vae", "text_encoder", "tokenizer", "model_version")
    files = {name: order.model[name] for name in names if name in order.model}
    if not files:
        return metadata
    return {**metadata, "model": {**metadata["model"], "files": files}}
