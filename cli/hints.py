"""``qengine hints``: what is known to go wrong with a prompt, and what to try when a result disappoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.presets import EDIT_TYPES, PRESETS, TROUBLES, Preset
from ..engine.prompts import TEMPLATES, hints
from .words import table


def show(words: Sequence[str], values: Mapping[str, Any]) -> int:
    """Print hints on a prompt, or everything there is to know; returns the exit code."""
    prompt = " ".join(words)
    if prompt:
        found = hints(prompt)
        print(json.dumps(found) if values["json"] else "\n".join(found) or "nothing known to go wrong with this prompt")
        return 0
    print(json.dumps(_as_json(), indent=2) if values["json"] else _as_text())
    return 0


def _as_json() -> dict[str, Any]:
    return {
        "troubles": dict(TROUBLES),
        "presets": {name: vars(preset) for name, preset in PRESETS.items()},
        "edit_types": {name: vars(preset) for name, preset in EDIT_TYPES.items()},
        "templates": dict(TEMPLATES),
    }


def _as_text() -> str:
    parts = [
        "When a result disappoints\n" + table([(f"  {name}", advice) for name, advice in TROUBLES.items()]),
        "--preset\n" + _presets(PRESETS),
        "--edit-type\n" + _presets(EDIT_TYPES),
        "--template, filled with --fill FIELD=TEXT\n"
        + table([(f"  {name}", text) for name, text in TEMPLATES.items()]),
    ]
    return "\n\n".join(parts)


def _presets(presets: Mapping[str, Preset]) -> str:
    rows = [("  name", "method", "strength", "denoise", "for")]
    for name, preset in presets.items():
        denoise = "" if preset.denoise is None else f"{preset.denoise:g}"
        rows.append((f"  {name}", preset.method, f"{preset.strength:g}", denoise, preset.use))
    return table(rows)
