"""Reference settings by goal and by kind of edit, and what to try when a result disappoints. Needs no torch.

Source: the midpoints of the ranges that users of reference latents work with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from .reference.options import Reference, Strength


@dataclass(frozen=True)
class Preset:
    """Settings of a preset.

    Attributes:
        method: reference method.
        strength: reference strength.
        denoise: share of the schedule that is run; None runs it whole.
        use: what it is for.
    """

    method: str
    strength: float
    use: str
    denoise: float | None = None


PRESETS: Mapping[str, Preset] = {
    "subtle": Preset("inject", 1.0, "fix lighting, remove blemishes"),
    "style": Preset("concat", 0.6, "anime, watercolour"),
    "replace": Preset("cross_attn", 0.7, "one object for another"),
    "scene": Preset("default", 0.4, "another season, day to night"),
    "identity": Preset("inject", 1.15, "other clothes, accessories, the same person"),
}
"""By goal: ``--preset``."""

EDIT_TYPES: Mapping[str, Preset] = {
    "colour": Preset("inject", 0.9, "another colour", 0.4),
    "style": Preset("concat", 0.6, "another style", 0.7),
    "swap": Preset("cross_attn", 0.7, "one object for another", 0.6),
    "add": Preset("default", 0.8, "something new in the picture", 0.5),
    "remove": Preset("inject", 1.1, "something gone", 0.4),
    "lighting": Preset("concat", 0.7, "another light", 0.5),
    "expression": Preset("cross_attn", 1.0, "another expression", 0.35),
    "background": Preset("default", 0.5, "another background", 0.7),
}
"""By kind of edit: ``--edit-type``."""

TROUBLES: Mapping[str, str] = {
    "nothing changes": "the reference is too strong: --reference-strength 0.5 to 0.7, or a higher --denoise",
    "structure is lost": "the reference is too weak: --reference-strength 0.8 to 1.0, or --reference-method inject",
    "artefacts and distortions": "the reference is stronger than 1.5: --reference-strength below 1.3",
    "only a part changes": "the method works against the edit: try another --reference-method, then the strength",
    "the picture shifts or zooms": "ask for the size of the input with --size, and measure with qengine compare",
    "things change that should not": "--mask for a region you know, --rcm for one you do not",
    "a face is not the same": "name the light and the glasses in the prompt; qengine hints PROMPT says what is missing",
}
"""What to try, by what is seen."""


@dataclass(frozen=True)
class Settings:
    """Settings of a request that come from presets and flags.

    Attributes:
        reference: options of the references.
        denoise: share of the schedule that is run, or None.
    """

    reference: Reference
    denoise: float | None = None


def settle(
    *,
    preset: str | None = None,
    edit_type: str | None = None,
    method: str | None = None,
    strength: Strength | tuple[Strength, ...] | None = None,
    denoise: float | None = None,
    **options: Any,
) -> Settings:
    """What a preset or a kind of edit says, each value replaced by the one that is given beside it.

    Args:
        preset: of ``PRESETS``.
        edit_type: of ``EDIT_TYPES``.
        method: text of the reference method.
        strength: of the references.
        denoise: share of the schedule that is run.
        options: the other fields of :class:`Reference`.

    Raises:
        RequestError: both tables are asked, a name is unknown, or a value is out of range.
    """
    if preset is not None and edit_type is not None:
        raise RequestError(f"settings must come from one table, got preset {preset!r} and edit type {edit_type!r}")
    chosen = None
    if preset is not None:
        chosen = find(PRESETS, preset, "preset")
    elif edit_type is not None:
        chosen = find(EDIT_TYPES, edit_type, "edit type")
    if chosen is not None:
        method = chosen.method if method is None else method
        strength = chosen.strength if strength is None else strength
        denoise = chosen.denoise if denoise is None else denoise
    said = {"method": method, "strength": strength}
    return Settings(Reference(**options, **{k: v for k, v in said.items() if v is not None}), denoise)


def find(table: Mapping[str, Preset], name: str, what: str) -> Preset:
    """A preset by name.

    Raises:
        RequestError: there is none.
    """
    if name not in table:
        raise RequestError(f"{what} must be one of {', '.join(table)}, got {name!r}")
    return table[name]
