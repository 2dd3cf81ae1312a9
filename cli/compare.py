"""``qengine compare``: what an edit changed where nothing was asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .order import check_files
from .outputs import check_picture_file, free_picture
from .words import table

if TYPE_CHECKING:
    from ..engine.compare import Comparison


def show(before: str, after: str, values: Mapping[str, Any]) -> int:
    """Compare two pictures, print the figures, write the picture of differences; returns the exit code.

    Raises:
        InputError: a picture is missing or bad, or the two cannot be compared.
        OutputError: the picture of differences cannot be written.
        RequestError: it would replace one of the pictures.
    """
    named = [Path(name) for name in (before, after, values["mask"]) if name is not None]
    check_files(named)
    output = Path(values["output"]) if values["output"] else free_picture(f"{Path(after).stem}_compared")
    check_picture_file(output, tuple(named))
    found = _compare(*named)
    _write(output, found)
    print(json.dumps({**as_json(found), "picture": str(output)}, indent=2) if values["json"] else as_text(found))
    if not values["json"]:
        print(output)
    return 0


def _compare(before: Path, after: Path, mask: Path | None = None) -> Comparison:
    from ..engine.compare import compare
    from ..engine.picture import load_mask, load_picture

    first, second = load_picture(before), load_picture(after)
    return compare(first.image, second.image, None if mask is None else load_mask(mask).image)


def _write(path: Path, found: Comparison) -> None:
    from ..engine.metadata import write_picture

    write_picture(path, found.difference, None)


def as_json(found: Comparison) -> dict[str, Any]:
    """The figures as JSON values; an infinite PSNR is null."""
    return {
        "psnr_db": None if math.isinf(found.psnr_db) else found.psnr_db,
        "differing_share": found.differing_share,
        "shift_pixels": list(found.shift_pixels),
        "zoom": found.zoom,
        "colour_drift_lab": list(found.colour_drift),
        "delta_e": found.delta_e,
        "unchanged_share": found.unchanged_share,
        "notes": list(found.notes),
    }


def as_text(found: Comparison) -> str:
    """The figures for people."""
    right, down = found.shift_pixels
    lightness, green_red, blue_yellow = found.colour_drift
    psnr = "infinite, every pixel is the same" if math.isinf(found.psnr_db) else f"{found.psnr_db:.2f} dB"
    drift = f"L* {lightness:+.2f}, a* {green_red:+.2f}, b* {blue_yellow:+.2f}; mean delta E {found.delta_e:.2f}"
    aside = f"{abs(right):.2f} pixels {'right' if right >= 0 else 'left'}"
    rows = [
        ("compared", f"{found.unchanged_share:.1%} of the picture"),
        ("PSNR", psnr),
        ("differing", f"{found.differing_share:.2%} of those pixels"),
        ("shift", f"{aside}, {abs(down):.2f} {'down' if down >= 0 else 'up'}"),
        ("zoom", "cannot be told" if found.zoom is None else f"{(found.zoom - 1):+.2%}"),
        ("colour", drift),
    ]
    return "\n".join([table(rows), *(f"note: {note}" for note in found.notes)])
