"""``qengine pack``: write a packed file on purpose, where the next run finds it or where it is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import backend
from .meter import PackMeter
from .order import SINGLE_FILES, device_choice, model_choice
from .progress import Talk
from .words import bytes_text

if TYPE_CHECKING:
    from ..loaders.source import ModelSource

SUFFIX = ".safetensors"


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Pack and print the paths; returns the exit code.

    Raises:
        RequestError: not exactly one model is named, or flags contradict each other.
        CheckpointError: the model is missing, damaged or has weights that are not finite.
        OutputError: the file cannot be written, or the disk has no room.
    """
    components, output = _checked(values)
    source = backend.open_source(**model_choice({**values, "model": _model(words, values)}))
    backend.defaults_of(source)
    for note in source.notes:
        talk.warn(note)
    files = []
    try:
        for component in components:
            path = _write(source, component, values, output, talk)
            files.append({"component": component, "path": str(path), "bytes": path.stat().st_size})
            if not values["json"]:
                print(path, flush=True)
    finally:
        talk.display.close()
    if values["json"]:
        print(json.dumps({"model": source.label, "weights": values["weights"], "files": files}, indent=2))
    return 0


def _write(source: ModelSource, component: str, values: Mapping[str, Any], output: Path | None, talk: Talk) -> Path:
    weights, progress = values["weights"], PackMeter(talk)
    if values["layout"] == "quanto" and output is not None:
        backend.pack_quanto(source, weights, output, progress)
        path, use = output, f"use it with --dit {output}"
    else:
        path = backend.pack(source, component, weights, path=output, progress=progress, **device_choice(values))
        use = "the next run finds it there" if output is None else f"use it with --packed {output}"
    size = bytes_text(path.stat().st_size)
    talk.say(f"{'done':<8} {source.label}, {component} in {weights}, {size}: {use}")
    return path


def _checked(values: Mapping[str, Any]) -> tuple[tuple[str, ...], Path | None]:
    """The components to pack and the file to write, after everything that can be refused without a model."""
    if values["weights"] is None:
        raise RequestError("--weights must be int8, fp8 or bf16, got none", hint="qengine pack MODEL --weights int8")
    chosen = values["component"] or "transformer"
    components = ("transformer", "text_encoder") if chosen == "both" else (chosen,)
    output = None if values["output"] is None else Path(values["output"])
    if output is not None:
        _check_output(output, chosen)
    if values["layout"] == "quanto" and (
        output is None or components != ("transformer",) or values["weights"] == "bf16"
    ):
        raise RequestError(
            "--layout quanto must come with --weights int8 or fp8, --output and the transformer, "
            f"got --weights {values['weights']}, --component {chosen} and --output {output}",
            hint=f"qengine pack MODEL --weights int8 --layout quanto --output FILE{SUFFIX}",
        )
    return components, output


def _check_output(output: Path, component: str) -> None:
    if component != "transformer":
        raise RequestError(
            f"--output must be given for the transformer alone, got --component {component}",
            hint="leave --output out: runs take a packed text encoder from the cache",
        )
    if output.suffix != SUFFIX or output.is_dir():
        raise RequestError(f"--output must be a file whose name ends in {SUFFIX}, got {output}")


def _model(words: Sequence[str], values: Mapping[str, Any]) -> str | None:
    files = any(values[name] for name in SINGLE_FILES)
    if len(words) != (0 if files else 1):
        got = f"{len(words)} beside --dit" if files else len(words)
        raise RequestError(f"pack must get one model, got {got}", hint="qengine pack MODEL --weights int8")
    return None if files else words[0]
