"""The image VAE at its real size (base 96, random weights, float32, CPU) against diffusers, and in one-byte weights."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from qengine.bench.rivals import duel
from qengine.bench.true_shapes import VAE
from qengine.engine.vae import ImageVAE
from qengine.engine.vae.config import VaeConfig, expected_shapes
from qengine.engine.vae.memory import weight_bytes

CONFIG: Mapping[str, Any] = {name: value for name, value in VAE.items() if not name.startswith("_")}
GATE = 1e-4
CASES = [(direction, pixels) for direction in ("decode", "encode") for pixels in (256, 512)]
SIDES = ("ours", "diffusers")


class RandomCheckpoint:
    """Tensors drawn from their names: the same in every process, and none held."""

    def __init__(self) -> None:
        self.shapes = expected_shapes(VaeConfig.parse(CONFIG))

    def require(self, expected: Mapping[str, tuple[int, ...]], subject: str) -> None:
        """Everything is there by construction."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor that keeps the scale of what flows through it."""
        shape = self.shapes[name]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) * 1000 + sum(name.encode())))
        if name.endswith("gamma"):
            return 1 + 0.1 * noise
        return 0.1 * noise if name.endswith("bias") else noise * torch.Size(shape[1:]).numel() ** -0.5


def our_side(weight_format: str = "bf16") -> Any:
    """Our VAE."""
    component: Any = SimpleNamespace(name="vae", config=CONFIG, checkpoint=RandomCheckpoint())
    return ImageVAE.load(component, device="cpu", dtype=torch.float32, weight_format=weight_format)


def diffusers_side() -> Any:
    """The same weights in diffusers."""
    from diffusers import AutoencoderKLQwenImage

    checkpoint = RandomCheckpoint()
    with torch.device("meta"):
        model = AutoencoderKLQwenImage(**CONFIG)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.shapes}, assign=True)
    return model.eval().requires_grad_(False)


def task(side: str, direction: str, pixels: int, model: Any) -> Callable[[], torch.Tensor]:
    """One encode or decode as a function of nothing."""
    generator = torch.Generator().manual_seed(0)
    if direction == "encode":
        image = torch.rand(1, 3, pixels, pixels, generator=generator) * 2 - 1
        if side == "ours":
            return lambda: model.encode(image)
        return torch.no_grad()(lambda: model.encode(image.unsqueeze(2)).latent_dist.mode())
    latents = torch.randn(1, 16, 1, pixels // 8, pixels // 8, generator=generator)
    if side == "ours":
        return lambda: model.decode(latents)
    return torch.no_grad()(lambda: model.decode(latents).sample[:, :, 0])


def peak_megabytes(side: str, direction: str, pixels: int) -> dict[str, float]:
    """Resident memory of one call in a process of its own, above what it was with the weights loaded.

    Linux only: the high-water mark is reset before the call, after one call at 64 pixels, which compiles kernels and
    starts threads on both sides.
    """
    command = [sys.executable, str(Path(__file__).resolve()), side, direction, str(pixels)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> float:
    # What the allocator has been given back but keeps would hide behind the weights what a call takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _measure(side: str, direction: str, pixels: int) -> dict[str, float]:
    torch.set_num_threads(2)
    import diffusers  # noqa: F401  (both sides start from the same imports)

    empty = _status("VmRSS")
    model = our_side() if side == "ours" else diffusers_side()
    run = task(side, direction, pixels, model)
    task(side, direction, 64, model)()
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    peak = _status("VmHWM")
    return {"activations": peak - loaded, "with_weights": peak - empty}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))) + "\n")
    sys.exit()

import pytest  # noqa: E402  (the process that measures memory does without it)


@cache
def _models() -> tuple[Any, Any]:
    return our_side(), diffusers_side()


@pytest.mark.parametrize(("direction", "pixels"), CASES)
def test_vae(benchmark: Any, direction: str, pixels: int) -> None:
    """Gate, time both sides in turns, then measure each one's memory alone."""
    ours, theirs = (task(side, direction, pixels, model) for side, model in zip(SIDES, _models(), strict=True))
    error = float((ours() - theirs()).abs().max())
    assert error < GATE, f"not the same result: {error}"
    # The gate has warmed both sides up; diffusers takes minutes for the larger size on two cores.
    result = duel(ours, theirs, rounds=3 if pixels <= 256 else 1, warmup=0)
    memory = [peak_megabytes(side, direction, pixels) for side in SIDES]
    benchmark.extra_info |= {
        "error": error,
        "ours_seconds": min(result.ours),
        "ours_median_seconds": statistics.median(result.ours),
        "diffusers_seconds": min(result.theirs),
        "diffusers_median_seconds": statistics.median(result.theirs),
        "speedup": result.speedup,
        "ours_megabytes": memory[0],
        "diffusers_megabytes": memory[1],
        "memory_ratio": memory[0]["activations"] / memory[1]["activations"],
        "memory_ratio_with_weights": memory[0]["with_weights"] / memory[1]["with_weights"],
    }
    benchmark.pedantic(ours, rounds=1, warmup_rounds=0)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_vae_weights(benchmark: Any, weight_format: str) -> None:
    """Drift of weights of one byte from plain ones at 256 pixels, and their bytes beside those of bfloat16."""
    plain, ours = _models()[0], our_side(weight_format)
    config, drift = VaeConfig.parse(CONFIG), {}
    for direction, peak in (("decode", 2.0), ("encode", None)):
        exact = task("ours", direction, 256, plain)()
        error = task("ours", direction, 256, ours)() - exact
        reach = peak or float(exact.max() - exact.min())
        drift[f"{direction}_max_error"] = float(error.abs().max())
        drift[f"{direction}_psnr"] = float(20 * math.log10(reach) - 10 * torch.log10(error.square().mean()))
    for part in ("encoder", "decoder"):
        drift[f"{part}_bytes"] = weight_bytes(config, part, 2, weight_format)
        drift[f"{part}_bytes_bf16"] = weight_bytes(config, part, 2)
    assert drift["decode_psnr"] > 25
    benchmark.extra_info |= drift
    benchmark.pedantic(task("ours", "decode", 256, ours), rounds=1, warmup_rounds=0)
