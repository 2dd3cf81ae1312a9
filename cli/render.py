"""``qengine render``: works off a queue of extracted jobs, beside any number of others that do the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.queue import Claim, JobFolder, Ledger, Worker
from ..errors import BatchError, Cancelled, CheckpointError, InputError, OutputError, QEngineError, RequestError
from .blend import BLEND, KNOBS, said_of
from .memory import memory_choice
from .meter import PackMeter
from .order import Order, device_choice, make_wish, model_choice, request_fields, seeds_of
from .outputs import LATENTS, PICTURE, Target
from .progress import Talk
from .queue import LEASE_SECONDS
from .run import Item, open_engine, run_one
from .words import seconds_text

if TYPE_CHECKING:
    from ..engine.qx import JobFile, Prepared
    from ..engine.session import Engine

POLL_SECONDS = 0.5
HOPELESS = (RequestError, InputError)
"""What another try would not change; a job for another model is left to a worker that has it."""
_STATES = {"done": "done", "failed": "failed", "passed": "for another model"}


@dataclass(frozen=True)
class Piece:
    """One result of a job.

    Attributes:
        key: identity: the job's content, what the command line says over it, model and seed.
        seed: of the noise; None leaves it to the request.
        target: where it goes.
    """

    key: str
    seed: int | None
    target: Target


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Work a queue off; returns the exit code.

    Raises:
        RequestError: not one queue, or a flag is out of range.
        InputError: no queue is there.
        OutputError: the results cannot be written.
        BatchError: this worker gave jobs up.
    """
    if len(words) != 1:
        raise RequestError(
            f"render must get one queue, got {len(words)}", hint="qengine render queue/ -o out/ --model MODEL"
        )
    lease = LEASE_SECONDS if values["lease"] is None else values["lease"]
    if not lease > 0:
        raise RequestError(f"--lease must be a time in seconds above 0, got {lease:g}")
    queue = JobFolder.open(Path(words[0]))
    folder = Path(values["output"] or f"{Path(words[0]).resolve().name}_out")
    if folder.exists() and folder.samefile(queue.root):
        raise RequestError(f"the results must go into a folder of their own, got the queue {folder}", hint="-o FOLDER")
    renderer = Renderer(order_of(values), said(values), Ledger(folder), talk)
    start = time.perf_counter()
    try:
        with Worker(queue, lease) as worker:
            renderer.run(worker, watch=values["watch"])
    finally:
        renderer.close()
    talk.say(f"{renderer.summary()}  {seconds_text(time.perf_counter() - start)}")
    if values["json"]:
        print(json.dumps({"outputs": renderer.results}, indent=2, default=str))
    states = [result["state"] for result in renderer.results]
    if "failed" in states:
        raise BatchError(
            f"all jobs must succeed, got {states.count('failed')} that failed",
            hint=f"{queue.failed} says why; jobs that are moved to {queue.pending} are tried again",
        )
    if "passed" in states:
        raise BatchError(
            f"all jobs must be for this model, got {states.count('passed')} that are for another",
            hint="they wait in the queue for a worker with it: --model",
        )
    return 0


def order_of(values: Mapping[str, Any]) -> Order:
    """What holds for every job: model, device, memory, kind of results."""
    return Order(
        kind="generate",
        request={},
        seeds=(0,),
        model={**model_choice(values), **device_choice(values), **memory_choice(values)},
        wish=make_wish({**values, "save_path": None}, "", "", ()),
        metadata=not values["no_metadata"],
        as_json=values["json"],
    )


def said(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says over every job, by the names of the request's fields and of the knobs."""
    spoken = any(values[flag.key] not in (None, False, ()) for flag in KNOBS + BLEND)
    fields = request_fields(values) | (said_of(values) if spoken else {})
    seeds = {name: values[name] for name in ("seed", "count") if values[name] is not None}
    return {**fields, **seeds}


def read_job(path: Path) -> JobFile:
    """A job file; imports torch."""
    from ..engine.qx import read_job as read

    return read(path)


def prepare(job: JobFile, values: Mapping[str, Any], engine: Engine) -> Prepared:
    """The request of a job file, as ``generate --conditioning`` makes it."""
    from ..engine.qx import prepare as made

    return made(job, values, engine)


class Renderer:
    """One engine and what it makes.

    Args:
        order: what holds for every job.
        over: what the command line says over every job.
        ledger: of the results.
        talk: words on stderr.

    Attributes:
        results: a line per result and per failure.
    """

    def __init__(self, order: Order, over: Mapping[str, Any], ledger: Ledger, talk: Talk) -> None:
        self.results: list[dict[str, Any]] = []
        self._order, self._over, self._ledger, self._talk = order, over, ledger, talk
        self._packing = PackMeter(talk)
        self._engine: Engine | None = None
        self._passed: set[str] = set()
        self._told: set[str] = set()

    def run(self, worker: Worker, *, watch: bool, sleep: Callable[[float], None] = time.sleep) -> None:
        """Do jobs until none waits and none is with another worker; with ``watch`` for ever.

        Raises:
            OutputError: the results or the queue cannot be written.
        """
        told = ""
        try:
            while True:
                claim = worker.claim(self._passed)
                if claim is not None:
                    told = ""
                    self._do(worker, claim, self._opened())
                    continue
                others = worker.others()
                if not watch and not others:
                    return
                words = f"for {others} job(s) of other workers" if others else "for jobs; Ctrl-C ends it"
                if words != told:
                    self._talk.say(f"{'waiting':<8} {words}")
                told = words
                sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            if self._engine is not None:
                self._engine.cancel()
            raise

    def close(self) -> None:
        """Free the engine."""
        self._talk.display.close()
        if self._engine is not None:
            self._engine.close()

    def summary(self) -> str:
        """What was done, in words."""
        states = [result["state"] for result in self.results]
        words = [f"{states.count(state)} {said}" for state, said in _STATES.items() if state in states]
        return ", ".join(words) or "nothing to do"

    def _do(self, worker: Worker, claim: Claim, engine: Engine) -> None:
        try:
            self._render(claim, engine)
        except Cancelled:
            raise
        except CheckpointError as error:
            self._pass(worker, claim, error)
            return
        except QEngineError as error:
            self._failed(worker, claim, error)
            # the next job would meet it too
            if isinstance(error, OutputError):
                raise
            return
        except Exception as error:
            worker.fail(claim, f"{type(error).__name__}: {error}", final=False)
            raise
        if not worker.finish(claim):
            self._talk.warn(f"{claim.name}: another worker took it back, since this one gave no sign for the lease")

    def _render(self, claim: Claim, engine: Engine) -> None:
        job = read_job(claim.path)
        asked = {**job.render, **self._over}
        seeds = seeds_of(asked.get("seed"), asked.get("count"))
        content = hashlib.sha256(claim.path.read_bytes()).hexdigest()
        # how many there are is no field of a request
        plain = replace(job, render={name: value for name, value in job.render.items() if name != "count"})
        over = {name: value for name, value in self._over.items() if name != "count"}
        for seed in seeds:
            stem = claim.name if len(seeds) == 1 else f"{claim.name}_{seed}"
            identity = json.dumps([content, over, engine.source.fingerprint, seed], sort_keys=True, default=str)
            piece = Piece(hashlib.sha256(identity.encode()).hexdigest(), seed, self._target(stem))
            self._make(engine, claim, piece, plain, over)

    def _make(self, engine: Engine, claim: Claim, piece: Piece, job: JobFile, over: Mapping[str, Any]) -> None:
        start = time.perf_counter()
        files = piece.target.paths
        made = prepare(job, {**over, "seed": piece.seed}, engine)
        if not self._ledger.begin(piece.key, files, where=claim.name, seed=piece.seed):
            self._talk.say(f"{'kept':<8} {files[0]}")
            self._result(piece, claim, "done")
            return
        self._sweep(files)
        for note in (note for note in made.notes if note not in self._told):
            self._told.add(note)
            self._talk.warn(note)
        record = {"conditioning": {"file": claim.path.name, **made.record}}
        run_one(engine, self._order, Item(made.request, piece.target, record), self._talk, self._packing)
        seconds = round(time.perf_counter() - start, 3)
        self._ledger.end(piece.key, files, where=claim.name, seed=piece.seed, seconds=seconds)
        self._result(piece, claim, "done")

    def _opened(self) -> Engine:
        if self._engine is None:
            self._engine = open_engine(self._order, self._talk, self._packing)
        return self._engine

    def _target(self, stem: str) -> Target:
        kind, folder = self._order.wish.kind, self._ledger.folder
        return Target(
            picture=folder / (stem + PICTURE) if kind != "latents" else None,
            latents=folder / (stem + LATENTS) if kind != "images" else None,
        )

    def _sweep(self, files: Sequence[Path]) -> None:
        """Delete what a killed worker left half-written of these files; the job is held, so nobody is at them."""
        for path in files:
            for left in path.parent.glob(f".{escape(path.name)}.*.part"):
                left.unlink(missing_ok=True)

    def _result(self, piece: Piece, claim: Claim, state: str) -> None:
        files = [str(path) for path in piece.target.paths]
        self.results.append({"job": piece.key, "state": state, "where": claim.name, "files": files, "seed": piece.seed})

    def _pass(self, worker: Worker, claim: Claim, error: CheckpointError) -> None:
        """Leave a job to a worker with another model."""
        self._passed.add(claim.name)
        worker.give_back(claim)
        self._talk.display.close()
        self._talk.warn(f"{claim.name} stays in the queue: {error.message}")
        self.results.append({"job": None, "state": "passed", "where": claim.name, "error": error.message})

    def _failed(self, worker: Worker, claim: Claim, error: QEngineError) -> None:
        self._talk.display.close()
        words = error.message + (f" ({error.hint})" if error.hint else "")
        given_up = worker.fail(claim, words, final=isinstance(error, HOPELESS))
        self._talk.warn(f"{claim.name}: {words}" + ("" if given_up else "; it goes back to the queue"))
        if given_up:
            line = {"where": claim.name, "error": error.message, "hint": error.hint}
            told = {"job": None, "state": "failed", **line}
            self._ledger.add(told)
            self.results.append(told)
