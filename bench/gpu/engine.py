"""Our transformer at true size with random weights, resident and streamed, under the ceilings given to the plan."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ...engine.ceiling import AllocationMeter, make_ceiling
from ...engine.measure import device_facts, facts_for
from ...engine.plan import Blocks, Budget, Choices, ModelFacts, Plan, make_plan, parse_size
from ...engine.stack import Hold
from ...kernels.quant import STORED
from ..clock import Stopwatch
from .geometry import EDIT_2511, TOY, Measured
from .probes import LINK_BYTES, TOY_BYTES, link, link_bytes_per_second
from .worker import Line, Run, per_step, pick_device, serve

RAM_BYTES = 100 << 30
CASES = (
    "fp8 resident",
    "fp8 12GiB",
    "fp8 6GiB",
    "fp8 8GiB",
    "fp8 24GiB",
    "bf16 12GiB",
    "int8 12GiB",
    "int8 resident",
    "bf16 resident",
)
TOY_CASES = ("fp8 resident", "fp8 swap1", "fp8 swap2", "fp8 sequential", "int8 resident", "int8 swap2", "bf16 swap2")


def engine(toy: bool) -> Run:
    """What measures a case ``FORMAT PLACE``; PLACE is ``resident``, ``sequential``, ``swapN`` or a ceiling."""
    return measuring(TOY if toy else EDIT_2511, toy)


def measuring(geometry: Measured, toy: bool) -> Run:
    """The same of any geometry."""
    device = pick_device(toy)
    bench = Bench(geometry, device, link(device, TOY_BYTES if toy else LINK_BYTES))

    def run(case: str) -> Iterator[Line]:
        weights, _, place = case.partition(" ")
        yield bench.measure(weights, place)

    return run


class Bench:
    """One geometry on one device.

    Args:
        geometry: model and request.
        device: where it runs.
        found: what the link's probe said.
    """

    def __init__(self, geometry: Measured, device: torch.device, found: Line) -> None:
        self._geometry, self._device = geometry, device
        self._link = link_bytes_per_second(found)
        self._source = geometry.source()
        self._facts = ModelFacts.of(self._source)
        self._flops = self._facts.transformer.step_flops(geometry.job())
        self._table: Any = None
        self._schedule = geometry.schedule()
        checkpoint: Any = self._source.transformer.checkpoint
        checkpoint.prepare(geometry.dtype, torch.bfloat16, *STORED.values())

    def plan(self, weights: str, place: str) -> Plan:
        """The plan of a case; on a CPU, a number of streamed blocks also gives the ceiling, its own prediction."""
        choices = Choices(weights=weights, **_placed(place))
        budget = Budget(ram_bytes=RAM_BYTES, vram_bytes=_ceiling(place))
        found = self._make_plan(budget, choices)
        if self._device.type == "cpu":
            return self._make_plan(replace(budget, vram_bytes=found.vram_bytes), choices)
        return found

    def _make_plan(self, budget: Budget, choices: Choices) -> Plan:
        job = self._geometry.job()
        measured = facts_for(self._device, self._facts, job, choices)
        return make_plan(self._facts, job, budget, replace(measured, link_bytes_per_second=self._link), choices)

    @torch.no_grad()
    def measure(self, weights: str, place: str) -> Line:
        """Load, run all steps, and tell what it took."""
        plan = self.plan(weights, place)
        phase = plan.phase("denoise")
        if phase.blocks is None:
            raise RuntimeError("a plan must place the transformer's blocks")
        meter = Meter(self._device, plan.ceilings.vram_bytes, plan.device.context_bytes)
        with meter.limited():
            before = time.perf_counter()
            hold = Hold.of(phase, plan.kernels_of("transformer"))
            transformer = self._geometry.load(self._source.transformer, self._device, hold)
            try:
                loaded = time.perf_counter() - before
                seconds, latents = self._denoise(transformer)
                ran = _told(transformer, phase.blocks, self._geometry.steps, on_cuda=self._device.type == "cuda")
                used = meter.used()
            finally:
                transformer.close()
        return {
            "weights": weights,
            "place": place,
            "kernels": plan.kernels_of("transformer"),
            "seconds_per_step": per_step(seconds),
            "seconds": seconds,
            "tflops": self._flops / per_step(seconds) / 1e12,
            "load_seconds": loaded,
            "link_bytes_per_second": self._link,
            "ceiling_bytes": plan.ceilings.vram_bytes,
            "plan_bytes": _alone(phase.vram_items),
            "plan_host_bytes": _alone(phase.host_items),
            "plan_context_bytes": plan.device.context_bytes,
            **used,
            **ran,
            "hash": hashlib.sha256(latents.float().cpu().numpy().tobytes()).hexdigest(),
            "finite": bool(latents.isfinite().all()),
        }

    def _denoise(self, transformer: Any) -> tuple[list[float], torch.Tensor]:
        """Seconds of each step, and the latents at the end."""
        geometry, schedule = self._geometry, self._schedule
        latents, evaluate = geometry.begin(transformer, self._device)
        times = [schedule.timestep(index, geometry.dtype) for index in range(geometry.steps)]
        if self._table is None:
            self._table = transformer.table(times)
        watch = Stopwatch(self._device)
        watch.mark()
        for index, timestep in enumerate(times):
            velocity = evaluate(latents, self._table, timestep, index + 1 < geometry.steps)
            latents = schedule.step(index, latents, velocity)
            watch.mark()
        return watch.seconds(), latents


class Meter:
    """The most that a run holds on the device, context included.

    Args:
        device: on a CPU, every operation is counted in its place.
        limit_bytes: the ceiling, enforced; None only measures.
        context_bytes: what the context took when the plan was made.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None, context_bytes: int) -> None:
        self._device = device
        self._counter = AllocationMeter(limit_bytes) if device.type == "cpu" else None
        self._ceiling = make_ceiling(device, limit_bytes, context_bytes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

    def limited(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the ceiling holds."""
        return self._ceiling() if self._counter is None else self._counter

    def used(self) -> dict[str, int]:
        """Peak by allocator and driver, and what the whole card holds now; call it inside."""
        if self._counter is not None:
            return {"peak_bytes": self._counter.peak, "context_bytes": 0, "card_bytes": self._counter.live}
        context = device_facts(self._device).context_bytes
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "peak_bytes": torch.cuda.max_memory_reserved(self._device) + context,
            "allocated_bytes": torch.cuda.max_memory_allocated(self._device),
            "context_bytes": context,
            "card_bytes": total - free,
        }


def _placed(place: str) -> dict[str, Any]:
    if place == "resident":
        return {"offload": "none"}
    if place == "sequential":
        return {"offload": "sequential"}
    return {"blocks_to_swap": int(place.removeprefix("swap"))} if place.startswith("swap") else {}


def _ceiling(place: str) -> int | None:
    return parse_size(place) if place[0].isdigit() else None


def _alone(items: tuple[tuple[str, int], ...]) -> int:
    """The phase without what the plan would keep of other components, which are not here."""
    return sum(size for label, size in items if not label.endswith(", kept"))


def _told(transformer: Any, blocks: Blocks, steps: int, *, on_cuda: bool) -> dict[str, Any]:
    """What the tape says of itself, beside what the plan says of it."""
    tape, placement = transformer.blocks, blocks.placement
    return {
        "blocks": len(tape),
        "streamed": len(tape.placement.streamed),
        "slots": blocks.slots,
        "host": placement.host,
        "copies": len(tape.copies),
        "copies_planned": len(placement.copied) * steps,
        "streamed_bytes_per_step": blocks.streamed_bytes,
        "host_bytes": tape.host_bytes,
        "registered_bytes": tape.host_bytes if on_cuda and tape.refusal is None else 0,
        "refusal": tape.refusal,
    }


if __name__ == "__main__":
    serve(engine)
