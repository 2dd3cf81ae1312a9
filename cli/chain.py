"""Edits after one another on the command line: stages of one edit, or one prompt after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import backend
from .meter import PackMeter
from .order import Order, check_files, read_by
from .outputs import Target, check_targets, choose
from .progress import Talk
from .run import Item, open_engine, run_one

if TYPE_CHECKING:
    from ..engine.chain import Link, Stage
    from ..engine.session import Engine


def carry_out(order: Order, talk: Talk) -> int:
    """Make every picture of the chain, the last under the name that was asked; returns the exit code.

    Raises:
        RequestError: stages and further prompts at once, several seeds, or a stage that is not understood.
    """
    if order.stages and order.then:
        raise RequestError("a chain must be told in one way, got --stage and --then")
    if len(order.seeds) != 1:
        raise RequestError(f"a chain must have one seed, got {len(order.seeds)}", hint="leave --count out")
    stages = [_stage(text) for text in order.stages]
    check_files(order.images)
    (target,) = choose(order.wish, order.seeds)
    targets = list(_targets(target, len(stages) or 1 + len(order.then)))
    for each in targets[:-1]:
        check_targets(each.paths, read_by(order), new=True)
    (seed,) = order.seeds
    backend.make_request(order.kind, order.request, order.images, seed)
    for path in order.images:
        backend.check_picture(path)
    try:
        results = _run(order, stages, targets, talk)
    finally:
        talk.display.close()
    if order.as_json:
        print(json.dumps({"outputs": results}, indent=2))
    return 0


def _run(order: Order, stages: list[Stage], targets: list[Target], talk: Talk) -> list[dict[str, Any]]:
    packing = PackMeter(talk)
    with backend.cancelling(open_engine(order, talk, packing)) as engine:
        editor = _Editor(engine, order, targets, talk, packing)
        for link in _links(editor, order, stages):
            talk.detail(f"{'stage':<8} {link.index + 1} {link.stage.method} {link.stage.strength} {link.stage.prompt}")
    return editor.results


def _links(editor: _Editor, order: Order, stages: list[Stage]) -> Iterator[Link]:
    from ..engine.chain import run_chain, run_stages

    options = {name: value for name, value in order.request.items() if name != "prompt"}
    prompt, (first, *_), (seed,) = order.request["prompt"], order.images, order.seeds
    if not stages:
        return run_chain(editor, first, [prompt, *order.then], seed=seed, **options)
    reference = options.pop("reference", None)
    more = {"keep_original": order.keep_original, "reference": reference, "seed": seed}
    return run_stages(editor, first, prompt, stages, **more, **options)


class _Editor:
    """Runs the edits of a chain with their progress shown, and hands on the files that they wrote.

    Args:
        engine: that edits.
        order: of the chain.
        targets: one per edit.
        talk: words on stderr.
        packing: shows packing.
    """

    def __init__(self, engine: Engine, order: Order, targets: list[Target], talk: Talk, packing: PackMeter) -> None:
        self._engine, self._order, self._targets = engine, order, targets
        self._talk, self._packing = talk, packing
        self.results: list[dict[str, Any]] = []

    def edit(self, images: tuple[Any, ...], prompt: str, **options: Any) -> Any:
        """Make the next picture and write it."""
        target = self._targets[len(self.results)]
        pictures = tuple(Path(image) for image in images) + (self._order.images[1:] if not self.results else ())
        seed = options.pop("seed")
        request = backend.make_request("edit", {"prompt": prompt, **options}, pictures, seed)
        order = replace(self._order, images=pictures, seeds=(seed,))
        self.results.append(run_one(self._engine, order, Item(request, target), self._talk, self._packing))
        return SimpleNamespace(image=target.picture)


def _targets(last: Target, count: int) -> Iterator[Target]:
    """``out_1.png``, ``out_2.png``, ... and the named one at the end."""
    if last.picture is None:
        raise RequestError("a chain must write pictures, got latents alone", hint="--output-type both")
    for number in range(1, count):
        yield Target(last.picture.with_stem(f"{last.picture.stem}_{number}"), None)
    yield last


def _stage(text: str) -> Stage:
    from ..engine.chain import Stage

    method, at, strength = text.partition("@")
    return Stage(method=method, strength=strength if at else 1.0)
