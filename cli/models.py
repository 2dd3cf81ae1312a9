"""``pull``, ``ls``, ``rm`` and ``verify``: the models in the hub's cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .progress import Talk
from .words import bytes_text, table


class BytesBar:
    """Shows bytes done while a model is pulled or verified.

    Args:
        phase: the word in front.
        talk: where it is shown.
    """

    def __init__(self, phase: str, talk: Talk) -> None:
        self._phase = phase
        self._talk = talk
        self._file = ""
        self._started = False

    def __call__(self, done: int, total: int, name: str) -> None:
        """``done`` of ``total`` bytes; ``name`` is the file at hand. A log gets one line per file."""
        if not self._started:
            self._talk.display.start(self._phase, total)
            self._started = True
        if self._talk.live or name != self._file:
            self._file = name
            self._talk.display.amount(done, f"{bytes_text(done)} of {bytes_text(total)}  {name}")


def pull(model: str, values: Mapping[str, Any], talk: Talk) -> int:
    """Download a model; what an earlier pull left is taken up again. Prints the folder."""
    from ..loaders import hub

    try:
        folder = hub.pull(model, offline=values["offline"], progress=BytesBar("pull", talk))
    finally:
        talk.display.close()
    _print({"model": model, "path": str(folder)}, str(folder), values)
    return 0


def list_all(values: Mapping[str, Any]) -> int:
    """Print the models that are here: the one inside qengine, then those of the hub's cache."""
    from ..loaders import hub

    tiny = tiny_folder()
    found = [dataclasses.asdict(model) for model in hub.list_models()]
    if tiny is not None:
        inside = {"hub_id": "tiny", "path": tiny, "nbytes": _folder_bytes(tiny), "complete": True, "missing": ()}
        found.insert(0, inside)
    rows = [(model["hub_id"], bytes_text(model["nbytes"]), _state(model), str(model["path"])) for model in found]
    _print({"models": found}, table(rows), values)
    return 0


def remove(model: str, values: Mapping[str, Any], talk: Talk) -> int:
    """Delete a model from the hub's cache."""
    from ..loaders import hub

    freed = hub.remove(model)
    talk.say(f"removed {model}, {bytes_text(freed)} freed")
    if values["json"]:
        _print({"model": model, "freed_bytes": freed}, "", values)
    return 0


def verify(model: str, values: Mapping[str, Any], talk: Talk) -> int:
    """Check every file of a model against its hash.

    Raises:
        CheckpointError: a file is altered or missing.
    """
    from ..loaders import hub

    try:
        result = hub.verify(model, progress=BytesBar("verify", talk))
    finally:
        talk.display.close()
    facts = {**dataclasses.asdict(result), "ok": result.ok}
    rows = [(state, name) for state in ("altered", "missing", "unchecked", "checked") for name in facts[state]]
    _print(facts, table(rows), values)
    if not result.ok:
        broken = [*result.altered, *result.missing]
        raise CheckpointError(
            f"{result.hub_id} must have every file, unaltered, got {len(broken)} bad: {', '.join(broken[:10])}",
            hint=f"qengine rm {model} && qengine pull {model}",
        )
    return 0


def tiny_folder() -> Path | None:
    """Folder of the model inside qengine, or None in an installation without it."""
    folder = Path(__file__).resolve().parent.parent / "loaders" / "tiny"
    return folder if (folder / "model_index.json").is_file() else None


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk where a folder is or would be."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _state(model: Mapping[str, Any]) -> str:
    return "complete" if model["complete"] else "incomplete"


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(facts: Mapping[str, Any], text: str, values: Mapping[str, Any]) -> None:
    output = json.dumps(facts, indent=2, default=str) if values["json"] else text
    if output:
        print(output)
