"""The embedded model end to end, against diffusers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine import Engine
from qengine.bench.rivals import duel
from qengine.bench.stock import reference_areas, stock_pipeline
from qengine.loaders.source import TINY

PROMPT = "make it grayscale"
SIZE = (256, 256)


def picture() -> Image.Image:
    """A fixed procedural picture of 256x256 pixels."""
    rows, columns = np.mgrid[0:256, 0:256]
    channels = [128 + 100 * np.sin(rows / a) * np.cos(columns / b) for a, b in ((19, 31), (41, 13), (23, 57))]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """The tiny model on the CPU with a cache of its own."""
    with Engine.open(device="cpu", cache_dir=tmp_path) as opened:
        yield opened


def test_edit_end_to_end(benchmark: Any, engine: Engine) -> None:
    """8 steps at 256x256 with weights loaded, from prompt and picture to pixels; every prompt is new to the cache."""
    pipe, image = stock_pipeline(TINY, torch_dtype=torch.float32), picture()
    names = iter(range(10**9))

    def theirs(prompt: str, output: str) -> Any:
        with reference_areas(SIZE[0] * SIZE[1], 384 * 384):
            return pipe(
                image=[image],
                prompt=prompt,
                true_cfg_scale=1.0,
                width=SIZE[0],
                height=SIZE[1],
                num_inference_steps=8,
                generator=torch.Generator().manual_seed(0),
                output_type=output,
            ).images

    def ours(prompt: str) -> Any:
        return engine.edit(image, prompt, size=SIZE, seed=0)

    pixels = [np.asarray(p, dtype=float) for p in (ours(PROMPT).image, theirs(PROMPT, "pil")[0])]
    error = float(np.abs(pixels[0] - pixels[1]).max())
    assert error <= 1, f"not the same picture: {error} of 255"
    result = duel(
        lambda: ours(f"{PROMPT} {next(names)}"), lambda: theirs(f"{PROMPT} {next(names)}", "pil"), rounds=5, warmup=2
    )
    benchmark.extra_info |= {
        "diffusers_seconds": min(result.theirs),
        "speedup": result.speedup,
        "largest_pixel_difference": error,
    }
    benchmark.pedantic(lambda: ours(f"{PROMPT} {next(names)}"), rounds=3)


def test_open_and_first_edit(benchmark: Any, tmp_path: Path) -> None:
    """From headers to picture with one step and nothing cached; the files are in the page cache."""
    image, folders = picture(), iter(range(10**9))

    def cold() -> None:
        with Engine.open(device="cpu", cache_dir=tmp_path / str(next(folders))) as opened:
            opened.edit(image, PROMPT, size=SIZE, num_inference_steps=1)

    benchmark.pedantic(cold, rounds=3, warmup_rounds=1)
