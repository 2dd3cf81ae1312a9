"""Measures the exported model on photos that were never trained on: `python -m qengine.bench.tiny.evaluate`.

Everything goes through one function `edit(image, prompt, size, steps, seed) -> image`: by default our engine, with
`--reference` the libraries' own modules. The exchange of embeddings alone always uses the latter.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

import torch
from PIL import Image, ImageOps

from ...engine.session import Engine
from . import edits, wordings
from .model import Model, to_tensor
from .say import say

ROOT = Path(__file__).resolve().parents[2]
MODEL, PHOTOS = ROOT / "loaders" / "tiny", ROOT / "tests" / "photos"
MAIN = (256, 256)
# Other sizes are measured on this many photos each: they show that the size works, the table is made at 256 x 256.
OTHER_SIZES = {(128, 128): 12, (192, 320): 2, (320, 192): 2, (512, 512): 1}
STEPS, SEED = 8, 0
Size = tuple[int, int]
Edit = Callable[[Image.Image, str, Size, int, int], Image.Image]
log = logging.getLogger(__name__)


@dataclass
class Scores:
    """PSNR in dB per edit and the share of results nearest to the asked edit, at one size."""

    psnr: dict[str, list[float]] = field(default_factory=dict)
    misses: list[str] = field(default_factory=list)

    def count(self) -> int:
        return sum(map(len, self.psnr.values()))

    def mean_psnr(self) -> float:
        return mean(value for values in self.psnr.values() for value in values)

    def nearest(self) -> float:
        return 100 * (1 - len(self.misses) / self.count())


def psnr(found: torch.Tensor, truth: torch.Tensor) -> float:
    """10 log10(1 / mean squared error), pixels in [0, 1]."""
    return 10 * math.log10(1 / max(float((found - truth).square().mean()), 1e-10))


def photos(folder: Path) -> dict[str, Image.Image]:
    """All photos of a folder, by name."""
    return {path.stem: Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))}


def fit(photo: Image.Image, size: Size) -> Image.Image:
    """The photo cut and scaled to fill a size [width, height]."""
    return ImageOps.fit(photo, size, Image.Resampling.LANCZOS)


def closest(found: torch.Tensor, source: torch.Tensor) -> str:
    """The edit whose true result lies nearest."""
    return max(edits.NAMES, key=lambda name: psnr(found, edits.apply(name, source)))


def score(edit: Edit, items: Iterable[tuple[str, Image.Image]], size: Size, names: Iterable[str]) -> Scores:
    """Every edit of every photo by its canonical wording."""
    out = Scores()
    for label, photo in items:
        image = fit(photo, size)
        source = to_tensor(image)
        for name in names:
            found = to_tensor(edit(image, wordings.CANONICAL[name], size, STEPS, SEED))
            out.psnr.setdefault(name, []).append(psnr(found, edits.apply(name, source)))
            nearest = closest(found, source)
            if nearest != name:
                out.misses.append(f"{label}: {name} came out as {nearest}")
        log.info("%s at %s: %.2f dB so far", label, size, out.mean_psnr())
    return out


def held_out(edit: Edit, items: list[tuple[str, Image.Image]], size: Size) -> tuple[int, list[str]]:
    """How many held-out wordings were tried, and those whose result is nearest to another edit."""
    wrong, tried = [], 0
    for name, texts in wordings.HELD_OUT.items():
        for prompt in texts:
            image = fit(items[tried % len(items)][1], size)
            nearest = closest(to_tensor(edit(image, prompt, size, STEPS, SEED)), to_tensor(image))
            tried += 1
            if nearest != name:
                wrong.append(f"{prompt!r} ({name}) came out as {nearest}")
    return tried, wrong


def exchange(model: Model, photo: Image.Image, size: Size, names: tuple[str, ...] = edits.NAMES) -> tuple[int, int]:
    """Gives each edit's prompt the embeddings of the next edit's prompt; returns tries and successes.

    The text reaches the transformer through the embeddings alone, so the result must be the next edit.
    """
    image = fit(photo, size)
    source = to_tensor(image)
    embeds = {name: model.embed(image, wordings.CANONICAL[name]) for name in names}
    good = 0
    for index in range(len(names)):
        other = names[(index + 1) % len(names)]
        good += closest(to_tensor(model.run(image, embeds[other], STEPS, SEED)), source) == other
    return len(names), good


def distances(items: list[tuple[str, Image.Image]], size: Size) -> dict[str, float]:
    """For each edit, the mean over photos of the PSNR of its nearest other true edit: how hard "nearest" is."""
    out = {}
    for name in edits.NAMES:
        values = []
        for _, photo in items:
            source = to_tensor(fit(photo, size))
            truth = edits.apply(name, source)
            values.append(max(psnr(truth, edits.apply(other, source)) for other in edits.NAMES if other != name))
        out[name] = mean(values)
    return out


def reference_edit(model: Model) -> Edit:
    """The reference loop in the form of `Edit`."""

    def edit(image: Image.Image, prompt: str, size: Size, steps: int, seed: int) -> Image.Image:
        return model.edit(fit(image, size), prompt, steps, seed)

    return edit


def engine_edit(engine: Engine) -> Edit:
    """Our engine in the form of `Edit`."""

    def edit(image: Image.Image, prompt: str, size: Size, steps: int, seed: int) -> Image.Image:
        return engine.edit(fit(image, size), prompt, size=size, num_inference_steps=steps, seed=seed).image

    return edit


def table(scores: dict[Size, Scores], nearest_other: dict[str, float]) -> str:
    """PSNR per edit and size as a Markdown table."""
    sizes = list(scores)
    lines = ["| edit | nearest other edit | " + " | ".join(f"{w} x {h}" for w, h in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 2) + "|")
    for name in edits.NAMES:
        cells = " | ".join(f"{mean(scores[size].psnr[name]):.1f}" for size in sizes)
        lines.append(f"| {name} | {nearest_other[name]:.1f} | {cells} |")
    lines.append("| **mean** | | " + " | ".join(f"**{scores[s].mean_psnr():.1f}**" for s in sizes) + " |")
    lines.append("| asked edit nearest, % | | " + " | ".join(f"{scores[s].nearest():.1f}" for s in sizes) + " |")
    lines.append("| photos | | " + " | ".join(str(scores[s].count() // len(edits.NAMES)) for s in sizes) + " |")
    return "\n".join(lines)


def evaluate(model: Model, edit: Edit, items: list[tuple[str, Image.Image]], quick: bool) -> dict[str, object]:
    """All measurements; says the table and returns what goes into the JSON file."""
    sizes = {MAIN: len(items)} | ({} if quick else OTHER_SIZES)
    scores = {size: score(edit, items[:count], size, edits.NAMES) for size, count in sizes.items()}
    apart = distances(items, MAIN)
    tried, wrong = held_out(edit, items, (128, 128))
    swaps, swapped = exchange(model, items[0][1], (128, 128))
    say(table(scores, apart))
    say(f"held-out wordings: {tried - len(wrong)} of {tried} right ({100 * (1 - len(wrong) / tried):.1f} %)")
    say(f"exchanged embeddings: {swapped} of {swaps} exchange the edit")
    for line in [miss for result in scores.values() for miss in result.misses] + wrong:
        say(f"  {line}")
    return {
        "sizes": {f"{w}x{h}": asdict(result) | {"mean_psnr": result.mean_psnr(), "nearest_percent": result.nearest()}
                  for (w, h), result in scores.items()},
        "nearest_other_edit_psnr": apart,
        "held_out": {"tried": tried, "wrong": wrong},
        "exchange": {"tried": swaps, "right": swapped},
    }  # fmt: skip


def main() -> None:
    """Parses the options and writes the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="exported folder")
    parser.add_argument("--photos", type=Path, default=PHOTOS, help="folder of JPEG photos")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--reference", action="store_true", help="run the libraries' modules instead of our engine")
    parser.add_argument("--quick", action="store_true", help="256 x 256 only")
    parser.add_argument("--limit", type=int, help="use only the first so many photos")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = Model(options.model)
    items = list(photos(options.photos).items())[: options.limit]
    with tempfile.TemporaryDirectory() as cache, Engine.open(options.model, device="cpu", cache_dir=cache) as engine:
        edit = reference_edit(model) if options.reference else engine_edit(engine)
        result = evaluate(model, edit, items, options.quick)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
