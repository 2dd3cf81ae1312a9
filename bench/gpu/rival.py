"""diffusers on the same job: its own transformer with random bfloat16 weights, resident and in its two offloads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

from ...engine.latents import combine
from ...engine.measure import device_facts, resident_bytes
from ...engine.plan import parse_size
from ...engine.schedule import make_schedule
from ..clock import Stopwatch
from .engine import Meter
from .geometry import EDIT_2511, TOY, Geometry, inputs
from .worker import Line, Run, per_step, pick_device, serve

CASES = ("resident", "group 12GiB", "sequential 12GiB", "group")
STEPS = {"resident": 4, "group": 3, "sequential": 2}
ROOT = "transformer_blocks."


def rival(toy: bool) -> Run:
    """What measures a case ``OFFLOAD [CEILING]``."""
    device = pick_device(toy)
    geometry = TOY if toy else EDIT_2511

    def run(case: str) -> Iterator[Line]:
        offload, _, ceiling = case.partition(" ")
        yield measure(geometry, device, offload, parse_size(ceiling) if ceiling else None)

    return run


@torch.no_grad()
def measure(geometry: Geometry, device: torch.device, offload: str, ceiling: int | None) -> Line:
    """Seconds per step of two forward passes and the Euler step, and the peak."""
    meter = Meter(device, ceiling, device_facts(device).context_bytes)
    with meter.limited():
        before = time.perf_counter()
        model = build(geometry, device, offload)
        loaded = time.perf_counter() - before
        seconds = denoise(model, geometry, device, STEPS[offload])
        used = meter.used()
    return {
        "offload": offload,
        "diffusers": metadata.version("diffusers"),
        "seconds_per_step": per_step(seconds),
        "seconds": seconds,
        "load_seconds": loaded,
        "ceiling_bytes": ceiling,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "process_bytes": resident_bytes(),
        **used,
    }


def build(geometry: Geometry, device: torch.device, offload: str) -> Any:
    """The model with random weights, ready to run; what is offloaded begins in host memory.

    For group offload all blocks are given one block's memory: diffusers copies each into pinned memory of its own, and
    the originals beside them would take another 40 GB.
    """
    from diffusers import QwenImageTransformer2DModel

    model: Any
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**geometry.transformer)
    model.pos_embed = type(model.pos_embed)(
        theta=10000, axes_dim=[*geometry.transformer["axes_dims_rope"]], scale_rope=True
    )
    model = model.to(geometry.dtype).eval().requires_grad_(False)
    _fill(model, geometry, device if offload == "resident" else torch.device("cpu"), share=offload == "group")
    if offload == "group":
        model.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=True,
        )
    elif offload == "sequential":
        from accelerate import cpu_offload

        cpu_offload(model, execution_device=device)
    return model


def _fill(model: Any, geometry: Geometry, where: torch.device, *, share: bool) -> None:
    """Give every parameter, which is on the meta device, memory and values."""
    checkpoint: Any = geometry.source().transformer.checkpoint
    first: dict[str, torch.nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        inner = name.split(".", 2)[2] if name.startswith(ROOT) else name
        value = first.get(inner) if share else None
        if value is None:
            value = torch.empty(parameter.shape, dtype=geometry.dtype, device=where)
            checkpoint.read_into([(name, value)])
        owner, _, leaf = name.rpartition(".")
        made = torch.nn.Parameter(value.detach(), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, made)
        first.setdefault(inner, made)


def denoise(model: Any, geometry: Geometry, device: torch.device, steps: int) -> list[float]:
    """Seconds of each step; both branches run one after the other, as the pipelines do."""
    latents, references, prompts = inputs(geometry, device)
    schedule = make_schedule(steps, latents.shape[1], geometry.source().scheduler_config)
    shapes = [[(1, *geometry.grid), (1, *geometry.grid)]]
    watch = Stopwatch(device)
    watch.mark()
    for index in range(steps):
        tokens = torch.cat([latents.to(geometry.dtype), references], dim=1)
        timestep = torch.full((1,), schedule.timestep(index, geometry.dtype), device=device, dtype=geometry.dtype)
        velocities = []
        for prompt in prompts:
            out = model(
                hidden_states=tokens,
                encoder_hidden_states=prompt[None],
                timestep=timestep,
                img_shapes=shapes,
                return_dict=False,
            )[0]
            velocities.append(out[:, : latents.shape[1]].float())
        latents = schedule.step(index, latents, combine(velocities[0], velocities[1], geometry.guidance))
        watch.mark()
    return watch.seconds()


if __name__ == "__main__":
    serve(rival)
