"""The cells of a sweep: made one after another, kept by a manifest, shown side by side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.whole import write_whole
from ..errors import BatchError, Cancelled, OutputError, QEngineError, RequestError
from ..version import __version__
from . import backend
from .cellbar import CellBar
from .manifest import Manifest, clear_parts, locked
from .meter import PackMeter
from .options import GENERATE_SECTIONS
from .outputs import PICTURES, Target, check_picture_file, check_preview_folder, check_targets
from .progress import Talk
from .run import Item, open_engine, run_one
from .steer import TEMPLATE

if TYPE_CHECKING:
    from ..engine.qx import JobFile, Prepared
    from ..engine.session import Engine
    from ..engine.sweep import Cell
    from .sweep import Sweep

FORMAT = "qengine-sweep-1"
DEFAULT_FOLDER = "sweep_out"
GRID, RECORD, READ = "grid.png", "sweep.json", "sweep.qx"
_NOT_REPEATED = {"output", "save_path", "resume", "json", "quiet", "verbose", "debug", "prompt"}
_NOT_REPEATED |= {flag.key for flag in TEMPLATE}


@dataclass(frozen=True)
class Folder:
    """Where a sweep goes.

    Attributes:
        path: folder of the cells.
        grid: the pictures side by side.
        named: the user named the grid's file, which is overwritten then.
    """

    path: Path
    grid: Path
    named: bool

    @classmethod
    def of(cls, values: Mapping[str, Any], inputs: tuple[Path, ...]) -> Folder:
        """What ``-o`` says: a folder, or the file of the grid, beside which a folder of its name is made.

        Raises:
            RequestError: two outputs, or one that is an input.
            OutputError: it cannot be written.
        """
        if values["output"] is not None and values["save_path"] is not None:
            raise RequestError("the output must be named once, got both --output and --save_path")
        if (values["output_type"] or "images") != "images":
            raise RequestError(f"a sweep must write pictures, got --output-type {values['output_type']}")
        if (values["count"] or 1) != 1:
            raise RequestError(f"a sweep must have one seed, got --count {values['count']}", hint="leave --count out")
        path = Path(values["output"] or values["save_path"] or DEFAULT_FOLDER)
        if path.suffix.lower() in PICTURES and not path.is_dir():
            check_picture_file(path, inputs)
            return cls(path.with_suffix(""), path, True)
        if path.exists() and not path.is_dir():
            raise OutputError(f"a sweep must go into a folder, got the file {path}", hint="-o FOLDER")
        return cls(path, path / GRID, False)


def make_cells(sweep: Sweep, folder: Folder, talk: Talk) -> int:
    """Make what is not made yet, then the grid and the record; returns the exit code.

    Raises:
        BatchError: some cells failed.
        OutputError: something stands there that this sweep did not make.
        RequestError: there is an earlier sweep, and it is not to be gone on with.
    """
    check_preview_folder(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(folder.path, resume=sweep.values["resume"])
    with locked(folder.path):
        clear_parts(folder.path)
        cells = Cells(sweep, folder, manifest, talk)
        results = cells.make()
        cells.show(results)
    failed = sum(each["state"] == "failed" for each in results.values())
    talk.say(f"{len(results) - failed} of {len(results)} cells done, side by side in {folder.grid}")
    if sweep.order.as_json:
        print(json.dumps({"outputs": list(results.values()), "grid": str(folder.grid)}, indent=2, default=str))
    else:
        print(folder.grid, flush=True)
    if failed:
        raise BatchError(
            f"all {len(results)} cells must succeed, got {failed} that failed",
            hint=f"{manifest.path} says why; the same command with --resume tries them again",
        )
    return 0


class Cells:
    """The cells of one command line.

    Args:
        sweep: what is to be done.
        folder: where it goes.
        manifest: what is done already.
        talk: words on stderr.
    """

    def __init__(self, sweep: Sweep, folder: Folder, manifest: Manifest, talk: Talk) -> None:
        self._sweep, self._folder, self._manifest, self._talk = sweep, folder, manifest, talk
        self._files = {cell: folder.path / f"{cell.stem}.png" for cell in sweep.axes.cells}
        self._hashes = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sweep.inputs}
        self._model: dict[str, Any] = {}
        ours = ([folder.grid] if not folder.named else []) + [folder.path / RECORD, folder.path / READ]
        for path in (*self._files.values(), *ours):
            check_targets((path,), sweep.inputs, new=not manifest.began((path,)))

    def make(self) -> dict[Cell, dict[str, Any]]:
        """Make every cell that is not done; returns a line per cell, row by row."""
        done: dict[Cell, dict[str, Any]] = {}
        for cell, file in self._files.items():
            if self._manifest.done(self._key(cell), (file,)):
                self._talk.say(f"{'kept':<8} {file}")
                done[cell] = self._known(cell)
        todo = [cell for cell in self._files if cell not in done]
        if todo:
            done |= self._run(todo)
        return {cell: done[cell] for cell in self._files}

    def show(self, results: Mapping[Cell, Mapping[str, Any]]) -> None:
        """Write the grid and the record."""
        shown = {
            cell: self._files[cell] if line["state"] == "done" else f"failed: {line['error']}"
            for cell, line in results.items()
        }
        grid, notes = self._sweep.axes.grid(shown, self._title())
        for note in notes:
            self._talk.warn(note)
        record = self._folder.path / RECORD
        for path in (self._folder.grid, record):
            self._manifest.add({"job": None, "state": "begun", "files": [str(path)]})
        backend.write_picture(self._folder.grid, grid, None)
        words = json.dumps(self._record(results), indent=1, default=str)
        write_whole(record, lambda temporary: _write_text(temporary, words))

    def _run(self, todo: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
        from ..engine.sweep import prepared

        sweep, packing = self._sweep, PackMeter(self._talk)
        results: dict[Cell, dict[str, Any]] = {}
        with backend.cancelling(open_engine(sweep.order, self._talk, packing)) as engine:
            job = self._job(engine, packing)
            self._about(engine, job)
            bar = CellBar(self._talk, len(todo))
            for cell, made in prepared(engine, job, sweep.axes, sweep.fields, todo):
                bar.tell(made.notes)
                with bar.cell(cell.label):
                    results[cell] = self._make(engine, cell, made, bar.talk)
            bar.end()
        return results

    def _job(self, engine: Engine, packing: PackMeter) -> JobFile:
        """What is read and encoded once, kept beside the cells so that each can be made again from it."""
        from ..engine.qx import read_job, write_job
        from ..engine.sweep import encoded
        from .sweep import read_pictures

        sweep, talk, file, key = self._sweep, self._talk, self._folder.path / READ, self._read_key()
        if self._manifest.done(key, (file,)):
            talk.say(f"{'kept':<8} {file}")
        else:
            job = read_pictures(sweep, engine, talk)
            packing.phase = "encode"
            talk.display.start("encode")
            job = encoded(engine, job, sweep.fields)
            talk.display.end("once for all cells")
            self._manifest.add({"job": key, "state": "begun", "files": [str(file)]})
            write_job(file, job)
            self._manifest.add({"job": key, "state": "done", "files": [str(file)]})
        return replace(read_job(file), knobs=sweep.job.knobs, blend=sweep.job.blend)

    def _make(self, engine: Engine, cell: Cell, made: Prepared, talk: Talk) -> dict[str, Any]:
        file = self._files[cell]
        self._manifest.add({"job": self._key(cell), "state": "begun", "files": [str(file)]})
        item, order = Item(made.request, Target(file, None), self._said(made)), self._sweep.order
        try:
            done = run_one(engine, replace(order, as_json=True), item, talk, PackMeter(talk))
        except Cancelled:
            raise
        except QEngineError as error:
            self._talk.warn(f"{cell.label}: {error.message}" + (f" ({error.hint})" if error.hint else ""))
            line = self._line(cell, "failed", error=error.message, hint=error.hint)
        else:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            line = self._line(cell, "done", seconds=done["seconds"], sha256=digest, notes=list(made.notes))
        self._manifest.add(line)
        return line

    def _said(self, made: Prepared) -> dict[str, Any]:
        """What a cell's metadata says, so that ``rerun`` finds the file beside it."""
        from .conditioning import words_of

        return {"conditioning": words_of(made.record, READ, self._sweep.values["vl_statistics"])}

    def _line(self, cell: Cell, state: str, **more: Any) -> dict[str, Any]:
        return {"job": self._key(cell), "state": state, "files": [str(self._files[cell])], **cell.numbers, **more}

    def _known(self, cell: Cell) -> dict[str, Any]:
        """What the manifest says of a cell that is done."""
        key = self._key(cell)
        return next(
            line for line in reversed(self._manifest.lines) if line.get("job") == key and line["state"] == "done"
        )

    def _read_key(self) -> str:
        """SHA-256 over everything that decides what is read and encoded."""
        from .blend import VL

        sweep = self._sweep
        names = ("prompt", "negative_prompt", "size", "size_rule", "true_cfg_scale", "guidance_scale")
        fields = {name: sweep.fields.get(name) for name in names}
        read = {flag.key: sweep.values[flag.key] for flag in VL}
        return _digest([fields, sorted(sweep.job.knobs.layers), read, list(self._hashes.values()), sweep.order.model])

    def _key(self, cell: Cell) -> str:
        """SHA-256 over everything that decides the picture: what is read, the request and the knobs."""
        from ..engine.qx.settings import knob_words

        sweep = self._sweep
        knobs = [knob_words(sweep.job.knobs), {**knob_words(sweep.job.blend), "alpha": cell.alpha}]
        fields = {name: value for name, value in sweep.fields.items() if name not in ("init_image", "statistics")}
        return _digest([self._read_key(), fields, cell.numbers, knobs])

    def _about(self, engine: Engine, job: JobFile) -> None:
        source = engine.source
        self._model = {
            "model": {"label": Path(source.label).name, "variant": source.variant, "fingerprint": source.fingerprint},
            "extractor": dict(job.extractor),
        }
        self._manifest.add({"job": None, "state": "opened", **self._model})

    def _title(self) -> str:
        sweep, job = self._sweep, self._sweep.job
        words = [f'"{sweep.order.request["prompt"]}"', f"seed {sweep.order.seeds[0]}"]
        if sweep.order.request.get("num_inference_steps") is not None:
            words.append(f"{sweep.order.request['num_inference_steps']} steps")
        if sweep.axes.alphas != (None,):
            words += [job.blend.mode, f"layer {job.knobs.hidden_layer}", f"tokens {job.knobs.token_selection}"]
        return ", ".join(words)

    def _record(self, results: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
        from ..engine.qx.settings import knob_words

        sweep = self._sweep
        known = next((each for each in reversed(self._manifest.lines) if each.get("state") == "opened"), {})
        return {
            "format": FORMAT,
            "qengine": __version__,
            "command": command_of(sweep.order.request["prompt"], sweep.values),
            **{name: known.get(name) for name in ("model", "extractor")},
            "request": {**sweep.order.request, "seed": sweep.order.seeds[0]},
            "inputs": self._hashes,
            "knobs": knob_words(sweep.job.knobs),
            "blend": {name: value for name, value in knob_words(sweep.job.blend).items() if name != "alpha"},
            "alphas": list(sweep.axes.alphas),
            "strengths": list(sweep.axes.strengths),
            "grid": self._folder.grid.name,
            "cells": [{**line, "files": [Path(file).name for file in line["files"]]} for line in results.values()],
        }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _write_text(path: Path, words: str) -> None:
    path.write_text(words + "\n", "utf-8")


def command_of(prompt: str, values: Mapping[str, Any]) -> list[str]:
    """The words of the command line that makes the same, without where it goes."""
    words = ["qengine", "generate", f"--prompt={prompt}"]
    for flag in (flag for flags in GENERATE_SECTIONS.values() for flag in flags):
        value = values.get(flag.key)
        if flag.key in _NOT_REPEATED or value is None or value is False or value == ():
            continue
        if not flag.takes_value:
            words.append(flag.name)
        else:
            words += [f"{flag.name}={each}" for each in (value if flag.many else (value,))]
    return words
