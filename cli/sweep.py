"""``qengine generate`` with a picture that is read: once for all shares and strengths that are asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RequestError
from . import backend
from .axes import numbers_of, pictures_of
from .blend import blend_of, knobs_of, open_extractor, recipe_of, told
from .cells import Folder, make_cells
from .meter import PackMeter
from .order import Order, check_files, generate_order
from .outputs import choose
from .progress import Talk
from .run import Item, open_engine, run_one
from .words import seconds_text

if TYPE_CHECKING:
    from ..engine.qx import JobFile
    from ..engine.session import Engine
    from ..engine.sweep import Axes
    from ..engine.vl import Recipe


@dataclass(frozen=True)
class Sweep:
    """What is to be done.

    Attributes:
        order: prompt, size, model and all else that holds for every cell.
        read: pictures that the extractor reads.
        job: knobs, and with ``--conditioning`` what was read elsewhere.
        axes: shares and strengths.
        values: of the flags.
    """

    order: Order
    read: tuple[Path, ...]
    job: JobFile
    axes: Axes
    values: Mapping[str, Any]

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Files that decide the results, or are looked at."""
        names = (self.order.request.get("init_image"), self.values.get("conditioning"), self.values["vl_statistics"])
        return (*self.read, *(Path(name) for name in names if name is not None))

    @property
    def fields(self) -> dict[str, Any]:
        """Of the request, and the statistics."""
        said = {"statistics": self.values["vl_statistics"], "seed": self.order.seeds[0]}
        return {**self.order.request, **{name: value for name, value in said.items() if value is not None}}


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Do a sweep, or the one run that the flags leave of it; returns the exit code.

    Raises:
        RequestError: flags contradict each other, or a value is out of range.
        InputError: a file cannot be read.
        OutputError: results cannot be written.
        BatchError: some cells failed.
    """
    sweep = sweep_of(words, values)
    check_files(sweep.inputs)
    for path in (*sweep.read, *(path for path in (sweep.order.request.get("init_image"),) if path is not None)):
        backend.check_picture(Path(path))
    try:
        if len(sweep.axes.cells) > 1:
            return make_cells(sweep, Folder.of(values, sweep.inputs), talk)
        return _one(sweep, talk)
    finally:
        talk.display.close()


def sweep_of(words: Sequence[str], values: Mapping[str, Any]) -> Sweep:
    """The sweep that flags and preset ask for; no model is opened.

    Raises:
        RequestError: flags contradict each other, or a value is out of range.
    """
    from ..engine.qx import JobFile, read_job

    read, init = pictures_of(values)
    file = values.get("conditioning")
    if file is not None and read:
        raise RequestError("pictures must be read once, got --conditioning beside --vl-model", hint="leave one out")
    job = JobFile() if file is None else read_job(file)
    job = replace(job, knobs=knobs_of(values, job.knobs), blend=blend_of(values, None, job.blend))
    recipe = recipe_of(values)
    if init is None and read and recipe is not None and recipe.same_image:
        init = read[0]
    settled = {**_with_preset(values, recipe), "init_image": init}
    if not words and values["prompt"] is None:
        settled["prompt"] = job.prompt
    order = generate_order(words, settled)
    starts = init is not None or job.given.init is not None
    one = order.request.get("strength")
    strengths = _strengths(values, one, starts, None if recipe is None else recipe.strength)
    request = {name: value for name, value in order.request.items() if name != "strength"}
    alphas = _alphas(values, job, bool(read) or job.raw is not None)
    from ..engine.sweep import Axes

    return Sweep(replace(order, request=request), read, job, Axes(alphas, strengths), values)


def read_pictures(sweep: Sweep, engine: Engine, talk: Talk) -> JobFile:
    """The job with what the extractor sees in the pictures; the extractor is loaded, used once and freed.

    Raises:
        CheckpointError: the extractor is missing, or of another width than the transformer takes.
        InputError: a picture cannot be read.
    """
    if not sweep.read:
        return sweep.job
    values = sweep.values
    from ..engine.qx.make import extractor_words
    from .extraction import raw_of

    talk.display.start("read")
    extractor = open_extractor(values)
    try:
        _check_width(extractor.hidden_size, engine)
        start = time.perf_counter()
        raw = raw_of(extractor, sweep.read, values, sweep.job.knobs.layers)
        took = seconds_text(time.perf_counter() - start)
    finally:
        extractor.unload()
    talk.display.end(f"{extractor.source.folder.name}, {len(raw.input_ids)} tokens, {took}, freed")
    for note in told(extractor, values):
        talk.warn(note)
    return replace(sweep.job, raw=raw, extractor=extractor_words(extractor))


def _one(sweep: Sweep, talk: Talk) -> int:
    """The run of a single cell, under the name that was asked, once per seed."""
    from ..engine.sweep import encoded, prepared

    order = sweep.order
    targets = choose(replace(order.wish, never=sweep.inputs), order.seeds)
    packing, results = PackMeter(talk), []
    with backend.cancelling(open_engine(order, talk, packing)) as engine:
        job = encoded(engine, read_pictures(sweep, engine, talk), sweep.fields)
        [(_, made)] = prepared(engine, job, sweep.axes, sweep.fields, sweep.axes.cells)
        for note in made.notes:
            talk.warn(note)
        for seed, target in zip(order.seeds, targets, strict=True):
            item = Item(replace(made.request, seed=seed), target, {"read": dict(made.record)})
            results.append(run_one(engine, order, item, talk, packing))
    if order.as_json:
        print(json.dumps({"outputs": results}, indent=2))
    return 0


def _with_preset(values: Mapping[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    steps = values["steps"] if values["steps"] is not None or recipe is None else recipe.steps
    return {**values, "steps": steps}


def _strengths(
    values: Mapping[str, Any], one: float | None, starts: bool, usual: float | None
) -> tuple[float | None, ...]:
    many = numbers_of("strengths", values["strengths"])
    if many and one is not None:
        raise RequestError("strength must be told in one way, got --strength and --strengths")
    if (many or one is not None) and not starts:
        raise RequestError("strength must stand beside a picture to start from, got none", hint="--init-image FILE")
    if many:
        return many
    return (one if one is not None else usual if starts else None,)


def _alphas(values: Mapping[str, Any], job: JobFile, read: bool) -> tuple[float | None, ...]:
    one, many = values["alpha"], numbers_of("alphas", values["alphas"])
    if many and one is not None:
        raise RequestError("alpha must be told in one way, got --alpha and --alphas")
    if (many or one is not None) and not read:
        raise RequestError(
            "alpha must stand beside a picture that is read, got none", hint="--vl-model DIR -i FILE, or --conditioning"
        )
    if many and values["token_alphas"]:
        raise RequestError("--alphas must be the only shares, got --token-alphas too")
    return many or ((job.blend.alpha,) if read else (None,))


def _check_width(width: int, engine: Engine) -> None:
    wanted = engine.source.transformer.config.get("cap_feat_dim")
    if wanted is None:
        raise CheckpointError(
            f"pictures must be read for Z-Image, which takes their hidden states, got {engine.source.variant}",
            hint="qengine edit shows pictures to an edit model",
        )
    if wanted != width:
        raise CheckpointError(
            f"what reads the pictures must have the width that the transformer takes, {wanted}, got {width}",
            hint="Z-Image goes with a Qwen3-VL-4B",
        )
