"""What the flags say of a picture to start from, and of Z-Image's ways to count steps, to guide and to size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..engine.request import SCHEDULES, SIZE_RULES
from ..engine.strength import DEFAULT_STRENGTH
from ..errors import RequestError
from .flag import Flag

INIT_IMAGE = Flag(
    name="--init-image", also=("--init_image",), metavar="FILE", help="A picture to start from, with noise on it."
)
STRENGTH = Flag(
    name="--strength",
    kind="float",
    metavar="X",
    help=f"How much of --init-image is made anew: share of the steps that are run, 0 to 1; {DEFAULT_STRENGTH:g}.",
)
WAYS = (
    Flag(
        name="--schedule",
        choices=SCHEDULES,
        help="Z-Image: --steps counts network evaluations, or the points of the published list (9 are 8 evaluations).",
    ),
    Flag(
        name="--cfg-normalization",
        also=("--cfg_normalization",),
        kind="float",
        metavar="X",
        help="Z-Image: longest guided velocity, in lengths of the prompt's own; 0, any, by default.",
    ),
    Flag(
        name="--cfg-truncation",
        also=("--cfg_truncation",),
        kind="float",
        metavar="X",
        help="Z-Image: model time 1 - sigma above which the prompt runs alone; 1, never, by default.",
    ),
    Flag(
        name="--size-rule",
        also=("--size_rule",),
        choices=SIZE_RULES,
        help="Any size to the pixel, padded inside; or both sides rounded down to multiples of 16.",
    ),
)
START = (INIT_IMAGE, replace(STRENGTH, also=("--denoise",)), *WAYS)
START_BESIDE_EDITS = (INIT_IMAGE, STRENGTH, *WAYS)
"""The same where ``--denoise`` is an edit's flag already; it is a generation's strength there too."""


def starting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a request to generate beside prompt, size and guidance; nothing where nothing is said.

    Raises:
        RequestError: the strength is given twice.
    """
    fields = {name: values.get(name) for name in ("schedule", "cfg_normalization", "cfg_truncation", "size_rule")}
    strength, init = values.get("strength"), values.get("init_image")
    denoise = None if init is None else values.get("denoise")
    if strength is not None and denoise is not None:
        raise RequestError(f"the strength must be given once, got --strength {strength:g} and --denoise {denoise:g}")
    fields["strength"] = denoise if strength is None else strength
    fields["init_image"] = None if init is None else Path(init)
    return {name: value for name, value in fields.items() if value is not None}


def refuse_in_edit(values: Mapping[str, Any]) -> None:
    """Raise RequestError where a job with pictures to edit also names what belongs to a generation."""
    for flag in START_BESIDE_EDITS:
        if values.get(flag.key) is not None:
            raise RequestError(
                f"{flag.name} must stand beside a prompt alone, got pictures to edit too",
                hint="--denoise is the share of the schedule of an edit",
            )
