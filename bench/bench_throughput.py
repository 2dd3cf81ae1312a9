"""Images per minute of the embedded model for queues of warm requests, against diffusers on the same queue.

``cold`` queues have another prompt in every request, so each is encoded; in ``cached`` ones all prompts and pictures
are the same and encoded before, so ours come from the cache. diffusers has no such cache and encodes every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qengine import Engine
from qengine.bench.bench_tiny import PROMPT, picture
from qengine.bench.rivals import in_turns, ratio
from qengine.bench.stock import reference_areas, stock_pipeline
from qengine.loaders.source import TINY

SIZE = (128, 128)
STEPS = 4
QUEUES = (1, 4, 16)
MINUTE = 60.0


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The tiny model on the CPU with a cache of its own."""
    with Engine.open(device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Diffusers' pipeline with the same weights."""
    return stock_pipeline(Path(TINY), torch_dtype=torch.float32)


@pytest.mark.parametrize("kind", ["cold", "cached"])
@pytest.mark.parametrize("queue", QUEUES)
def test_queue(benchmark: Any, engine: Engine, pipe: Any, queue: int, kind: str) -> None:
    """Both sides take the requests of the queue in turns; 4 steps at 128 x 128, models loaded, one worker."""
    image, number = picture().resize(SIZE), iter(range(10**9))
    serial = {"ours": 0, "theirs": 0}

    def prompt(side: str) -> str:
        serial[side] += 1
        return PROMPT if kind == "cached" else f"{PROMPT} {queue} {serial[side]}"

    def ours() -> Any:
        return engine.edit(image, prompt("ours"), size=SIZE, num_inference_steps=STEPS, seed=next(number)).image

    def theirs(seed: int = 0) -> Any:
        with reference_areas(SIZE[0] * SIZE[1], 384 * 384):
            return pipe(
                image=[image],
                prompt=prompt("theirs"),
                true_cfg_scale=1.0,
                width=SIZE[0],
                height=SIZE[1],
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]

    mine, stock = (np.asarray(made, dtype=float) for made in (ours(), theirs()))
    error = float(np.abs(mine - stock).max())
    assert error <= 1, f"not the same picture: {error} of 255"
    found = in_turns((ours, theirs), rounds=queue, warmup=1)
    benchmark.extra_info |= {
        "ours_seconds": sum(found[0]),
        "rival_seconds": sum(found[1]),
        "speedup": ratio(found[1], found[0]),
        "images_per_minute": MINUTE * queue / sum(found[0]),
        "diffusers_images_per_minute": MINUTE * queue / sum(found[1]),
    }
    benchmark.pedantic(ours, rounds=1)
