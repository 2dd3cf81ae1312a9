"""The README's contact sheet: ``python -m qengine.bench.tiny.sheet``. Photos it never saw, every edit, one seed."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from ...engine.session import Engine
from . import edits, wordings
from .evaluate import PHOTOS, ROOT, STEPS, fit, photos

CELL, LABEL, SIDE = 144, 16, 256
ROWS = ("cat", "hopper", "coffee", "rocket")
PER_LINE = 8


def draw(engine: Engine, chosen: dict[str, Image.Image]) -> Image.Image:
    """One band per photo: the photo, then every edit, eight cells to a line, each under its name."""
    names = ("photo", *(name for name in edits.NAMES if name != "keep"))
    lines = -(-len(names) // PER_LINE)
    sheet = Image.new("RGB", (PER_LINE * CELL, len(chosen) * lines * (CELL + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for band, photo in enumerate(chosen.values()):
        source = fit(photo, (SIDE, SIDE))
        for index, name in enumerate(names):
            picture = source if name == "photo" else _edit(engine, source, name)
            left = index % PER_LINE * CELL
            top = (band * lines + index // PER_LINE) * (CELL + LABEL)
            pen.text((left + 4, top + 2), name, fill="black")
            sheet.paste(picture.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS), (left + 2, top + LABEL))
    return sheet


def _edit(engine: Engine, source: Image.Image, name: str) -> Image.Image:
    return engine.edit(source, wordings.CANONICAL[name], size=(SIDE, SIDE), num_inference_steps=STEPS).image


def main() -> None:
    """Draw the sheet and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "bench" / "results" / "sheet.jpg")
    options = parser.parse_args()
    found = photos(PHOTOS)
    with Engine.open(device="cpu") as engine:
        sheet = draw(engine, {name: found[name] for name in ROWS})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output, quality=88)


if __name__ == "__main__":
    main()
