"""The embedded model end to end, against diffusers on the same weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine import Engine
from qengine.bench.rivals import duel
from qengine.bench.stock import stock_pipeline
from qengine.loaders import open_model

PROMPT = "make it grayscale"


def photo() -> Image.Image:
    """A fixed procedural picture of 256x256 pixels."""
    rows, columns = np.mgrid[0:256, 0:256]
    channels = [128 + 100 * np.sin(rows / a) * np.cos(columns / b) for a, b in ((19, 31), (41, 13), (23, 57))]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both engines, warm, as functions of nothing that return final latents."""
    folder = tmp_path_factory.mktemp("cache")
    engine = Engine.open(device="cpu", cache_dir=folder)
    pipe = stock_pipeline(open_model(None), area=256 * 256)
    picture = photo()
    seeds = iter(range(10**9))

    def ours() -> torch.Tensor:
        # a prompt never seen, so that the conditioning cache cannot answer
        return engine.edit(picture, f"{PROMPT} {next(seeds)}", size=(256, 256), true_cfg_scale=1.0).latents

    def theirs() -> torch.Tensor:
        return pipe(picture, f"{PROMPT} {next(seeds)}", seed=0, steps=8, size=(256, 256))

    return SimpleNamespace(ours=ours, theirs=theirs, engine=engine, pipe=pipe, picture=picture)


def test_edit_end_to_end(benchmark: Any, sides: Any) -> None:
    """8 steps at 256x256: prompt, picture, denoising, decoding."""
    mine = sides.engine.edit(sides.picture, PROMPT, size=(256, 256), true_cfg_scale=1.0)
    stock = sides.pipe(sides.picture, PROMPT, seed=0, steps=8, size=(256, 256), output="latents")
    error = (mine.latents - stock).norm() / stock.norm()
    assert error < 1e-3, f"not the same result: {error}"
    result = duel(sides.ours, sides.theirs, rounds=5)
    benchmark.extra_info |= {"diffusers_seconds": min(result.theirs), "speedup": result.speedup, "error": float(error)}
    benchmark.pedantic(sides.ours, rounds=3, warmup_rounds=0)


def test_open_and_first_edit(benchmark: Any, tmp_path: Path) -> None:
    """Everything from headers to picture with nothing cached, weights in the page cache."""
    picture = photo()
    counter = iter(range(10**9))

    def cold() -> None:
        with Engine.open(device="cpu", cache_dir=tmp_path / str(next(counter))) as engine:
            engine.edit(picture, PROMPT, size=(256, 256), num_inference_steps=1)

    benchmark.pedantic(cold, rounds=3, warmup_rounds=1)
