"""One edit at five strengths, by four methods, with a mask and with RCM: ``python -m qengine.bench.tiny.strengths``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ...engine.compare import compare
from ...engine.keep.options import Keep
from ...engine.reference.options import METHODS, Reference
from ...engine.session import Engine
from . import wordings
from .evaluate import PHOTOS, ROOT, SEED, STEPS, fit, photos

CELL, LABEL, SIDE = 144, 42, 256
PHOTO, EDIT = "coffee", "grayscale"
STRENGTHS = (0.0, 0.3, 0.5, 1.0, 1.5)
BOX = (96, 64, 208, 192)


def region() -> Image.Image:
    """The mask of the picture: white in one box."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, BOX)
    return mask


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of every edit, one row of the picture after another."""
    for method in METHODS:
        for strength in STRENGTHS:
            yield f"{method} {strength:g}", {"reference": Reference(method=method, strength=strength)}
    yield "mask", {"keep": Keep(mask=region())}
    yield "RCM", {"keep": Keep(rcm=True)}
    yield "masked reference", {"reference": Reference(masks=(region(),))}
    yield "denoise 0.7", {"denoise": 0.7}


def run(engine: Engine, photo: Image.Image) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """The figures of every case, and its picture: how far it is from the input, as a whole and outside the box."""
    for name, options in cases():
        image = engine.edit(
            photo, wordings.CANONICAL[EDIT], size=(SIDE, SIDE), num_inference_steps=STEPS, seed=SEED, **options
        ).image
        whole, outside = compare(photo, image), compare(photo, image, region())
        figures = {
            "case": name,
            "psnr_db": round(whole.psnr_db, 2),
            "shift_pixels": round(math.hypot(*whole.shift_pixels), 2),
            "delta_e": round(whole.delta_e, 2),
            "equal_outside_the_box": outside.differing_share == 0,
            "equal_share": round(1 - whole.differing_share, 3),
        }
        yield figures, image


def label(figures: dict[str, Any]) -> str:
    """What stands over a picture."""
    drift = f"dE {figures['delta_e']:.1f}, shift {figures['shift_pixels']:.1f}"
    return f"{figures['case']}\n{figures['psnr_db']:.1f} dB\n{drift}"


def draw(photo: Image.Image, made: list[tuple[dict[str, Any], Image.Image]]) -> Image.Image:
    """A row per method and one for the rest, each picture under its name and its distance to the input."""
    cells = [("input", photo)]
    cells += [(label(figures), image) for figures, image in made[len(METHODS) * 5 :]]
    rows = [made[i : i + 5] for i in range(0, len(METHODS) * 5, 5)]
    lines = [[(label(figures), image) for figures, image in row] for row in rows] + [cells]
    sheet = Image.new("RGB", (5 * CELL, len(lines) * (CELL + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, row in enumerate(lines):
        for column, (words, image) in enumerate(row):
            left, top = column * CELL, line * (CELL + LABEL)
            pen.multiline_text((left + 4, top + 1), words, fill="black", spacing=1)
            sheet.paste(image.resize((CELL - 4, CELL - 4), Image.Resampling.LANCZOS), (left + 2, top + LABEL))
    return sheet


def main() -> None:
    """Draw the picture and write its figures, one JSON line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "bench" / "results" / "references.jpg")
    options = parser.parse_args()
    photo = fit(photos(PHOTOS)[PHOTO], (SIDE, SIDE))
    with Engine.open(device="cpu") as engine:
        made = list(run(engine, photo))
    draw(photo, made).save(options.output, quality=88)
    lines = "".join(json.dumps({"photo": PHOTO, "edit": EDIT, **figures}) + "\n" for figures, _ in made)
    options.output.with_suffix(".json").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
