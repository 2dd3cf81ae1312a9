"""Step time and measured peak by where the weights lie, beside everything resident in the same run.

The embedded model through the engine, and three blocks of true shape with random int8 weights on a tape of their own;
true geometry on a card is ``python -m qengine.bench.gpu``. Peaks are counted operation by operation, on a CPU only.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine import Choices, EditRequest, Engine, Step
from qengine.bench.bench_tiny import PROMPT, picture
from qengine.bench.gpu.weights import RandomCheckpoint
from qengine.bench.rivals import in_turns, ratio
from qengine.bench.true_shapes import transformer
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.dit import QwenImageTransformer
from qengine.engine.mover import Placement
from qengine.engine.stack import Hold, pack
from qengine.loaders.component import Component
from qengine.loaders.shapes import transformer_shapes

CPU = torch.device("cpu")
SIZE = (128, 128)
STEPS = 4
TINY_PLACES = {
    "resident": Choices(offload="none"),
    "swap2": Choices(blocks_to_swap=2),
    "sequential": Choices(offload="sequential"),
}

BLOCKS = 3
CONFIG = {**transformer(BLOCKS), "zero_cond_t": False}
GRID, TEXT_TOKENS, TIMESTEP = (8, 8), 16, 1.0
EVERY = tuple(range(BLOCKS))
TRUE_PLACES = {
    "resident": Placement(BLOCKS),
    "arena": Placement(BLOCKS, EVERY, slots=2, host="arena"),
    "disk": Placement(BLOCKS, EVERY, slots=2, host="disk"),
    "mapped": Placement(BLOCKS, EVERY, slots=2, host="mapped"),
}


@pytest.mark.parametrize("place", TINY_PLACES)
def test_tiny(benchmark: Any, tmp_path: Path, place: str) -> None:
    """The embedded model at 128 x 128, from the end of the first step to that of the last, in turns with resident."""
    request = EditRequest(images=(picture(),), prompt=PROMPT, size=SIZE, num_inference_steps=STEPS, seed=0)
    last: dict[str, torch.Tensor] = {}

    def run(engine: Engine, name: str) -> float:
        moments = []
        for event in engine.stream(request):
            if isinstance(event, Step):
                moments.append(time.perf_counter())
                last[name] = event.latents
        return (moments[-1] - moments[0]) / (STEPS - 1)

    def open_in(where: str) -> Engine:
        return Engine.open(device="cpu", cache_dir=tmp_path / "cache", choices=TINY_PLACES[where])

    with open_in(place) as engine:
        plan = engine.plan(request)
        with AllocationMeter() as meter:
            run(engine, "counted")
    with open_in("resident") as resident, open_in(place) as engine:
        pairs = [(run(engine, "ours"), run(resident, "resident")) for _ in range(4)][1:]
        assert torch.equal(last["ours"], last["resident"]), "placement must not change a bit"
        _tell(benchmark, *zip(*pairs, strict=True), peak=meter.peak)
        benchmark.extra_info |= {"plan_mb": plan.vram_bytes / 1e6}
        benchmark.pedantic(lambda: run(engine, "ours"), rounds=1)


@dataclass(frozen=True)
class TrueShape:
    """Three blocks: the component, and the packed file of its int8 weights."""

    component: Component
    packed: Path

    def load(self, place: str) -> QwenImageTransformer:
        """The transformer with its blocks in a place."""
        hold = Hold("int8", TRUE_PLACES[place], self.packed)
        return QwenImageTransformer.load(self.component, device=CPU, dtype=torch.float32, cache=None, hold=hold)


@pytest.fixture(scope="module")
def true_shape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrueShape]:
    """Random weights, packed once; 0.6 GB on the disk, removed at the end."""
    component = Component("transformer", CONFIG, RandomCheckpoint("transformer", transformer_shapes(CONFIG)))
    folder = tmp_path_factory.mktemp("packed")
    pack(QwenImageTransformer.stack(component, "int8", torch.float32), folder / "packed.safetensors")
    yield TrueShape(component, folder / "packed.safetensors")
    shutil.rmtree(folder)


def _step(model: QwenImageTransformer) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(TEXT_TOKENS, CONFIG["joint_attention_dim"], generator=generator)
    latents = torch.randn(1, GRID[0] * GRID[1], CONFIG["in_channels"], generator=generator)
    branch, table = model.branch(prompt, [GRID]), model.table([TIMESTEP])
    return torch.no_grad()(lambda: model.velocity(latents, None, [branch], table, TIMESTEP)[0])


@pytest.mark.parametrize("place", TRUE_PLACES)
@torch.no_grad()
def test_true_shape(benchmark: Any, true_shape: TrueShape, place: str) -> None:
    """One forward pass of three blocks over 80 tokens, where reading the weights is much of the work."""
    with AllocationMeter() as meter:
        model = true_shape.load(place)
        step = _step(model)
        # Making the table of modulation rows took more than a step does.
        meter.peak = meter.live
        found = step()
        model.close()
    ours, resident = true_shape.load(place), true_shape.load("resident")
    try:
        run, beside = _step(ours), _step(resident)
        assert torch.equal(beside(), found), "placement must not change a bit"
        times = in_turns((run, beside), rounds=3)
        _tell(benchmark, *times, peak=meter.peak)
        benchmark.extra_info |= {"streamed_mb": _streamed_bytes(true_shape, place) / 1e6}
        benchmark.pedantic(run, rounds=1)
    finally:
        ours.close()
        resident.close()


def _streamed_bytes(true_shape: TrueShape, place: str) -> int:
    """What a step copies."""
    stack = QwenImageTransformer.stack(true_shape.component, "int8", torch.float32)
    return sum(stack.layouts[block].nbytes for block in TRUE_PLACES[place].copied)


def _tell(benchmark: Any, ours: tuple[float, ...], resident: tuple[float, ...], *, peak: int) -> None:
    benchmark.extra_info |= {
        "ours_seconds": min(ours),
        "resident_step_seconds": min(resident),
        "x_resident": ratio(ours, resident),
        "peak_mb": peak / 1e6,
    }
