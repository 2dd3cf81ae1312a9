"""How far a run of the embedded model in a weight format drifts from the same run in float32."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ..engine.events import Encoded, Step
from ..engine.plan import Choices
from ..engine.request import EditRequest
from ..engine.session import Engine
from .ops import error
from .tiny.evaluate import PHOTOS, SEED, fit, photos, psnr
from .tiny.model import to_tensor
from .tiny.wordings import CANONICAL

FORMATS = ("bf16", "int8", "fp8")
EDITS = ("grayscale", "night")
SIZE = (256, 256)
STEPS = 8
WINDOW, SIGMA = 11, 1.5
STABLE = (0.01**2, 0.03**2)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity, the mean over pixels and channels of

        (2 m_a m_b + c1) (2 v_ab + c2) / ((m_a^2 + m_b^2 + c1) (v_a + v_b + c2))

    with means m, variances v and covariance v_ab under a Gaussian window of 11 x 11 and sigma 1.5, c1 = 0.01^2 and
    c2 = 0.03^2. Windows that leave the picture do not count.

    Args:
        a: [C, h, w] in [0, 1], h and w at least 11.
        b: the same shape.

    Source: Wang, Bovik, Sheikh and Simoncelli, IEEE Transactions on Image Processing 13 (4), 2004.
    """  # noqa: D205, D400, D415 (the formula comes first)
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = a.double()[:, None], b.double()[:, None]
    mean_x, mean_y, xx, yy, xy = (F.conv2d(values, window) for values in (x, y, x * x, y * y, x * y))
    c1, c2 = STABLE
    same = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    whole = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float((same / whole).mean())


@dataclass(frozen=True)
class Outcome:
    """What a run gave: prompt embeddings [T, D], final latents, and pixels [3, h, w] in [0, 1]."""

    embeds: torch.Tensor
    latents: torch.Tensor
    pixels: torch.Tensor


Runs = Mapping[tuple[str, str], Outcome]
"""Outcomes by photo and edit."""


def runs(
    weight_format: str | None, names: Sequence[str], edits: Sequence[str], size: tuple[int, int], steps: int
) -> Runs:
    """Run the embedded model on photos.

    Args:
        weight_format: of transformer and text encoder, computed in bfloat16; None is float32 throughout.
        names: of the photos.
        edits: by their canonical wordings.
        size: width and height in pixels.
        steps: of a run.
    """
    known = photos(PHOTOS)
    options: dict[str, Any] = {"dtype": "float32"}
    if weight_format is not None:
        options = {"dtype": "bfloat16", "choices": Choices(weights=weight_format)}
    with tempfile.TemporaryDirectory() as cache, Engine.open(device="cpu", cache_dir=cache, **options) as engine:
        return {
            (name, edit): _run(engine, fit(known[name], size), CANONICAL[edit], size, steps)
            for name in names
            for edit in edits
        }


def _run(engine: Engine, photo: Image.Image, prompt: str, size: tuple[int, int], steps: int) -> Outcome:
    request = EditRequest(images=(photo,), prompt=prompt, size=size, num_inference_steps=steps, seed=SEED)
    embeds, latents, last = torch.empty(0), torch.empty(0), None
    for event in engine.stream(request):
        if isinstance(event, Encoded):
            embeds = event.conditioning.prompt_embeds.float()
        elif isinstance(event, Step):
            latents = event.latents
        else:
            last = event
    if last is None:
        raise RuntimeError("a run must end with a picture")
    return Outcome(embeds, latents, to_tensor(last.image))


def drifts(
    formats: Sequence[str] = FORMATS,
    names: Sequence[str] | None = None,
    edits: Sequence[str] = EDITS,
    *,
    size: tuple[int, int] = SIZE,
    steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
    """One line per format: drift of latents and picture from float32, and of the prompt embeddings from bfloat16.

    Args:
        formats: weight formats; the first is what the embeddings of the others are compared with.
        names: of photos; None takes every fourth.
        edits: which edits.
        size: width and height in pixels.
        steps: of a run.
    """
    chosen = sorted(photos(PHOTOS))[::4] if names is None else names
    exact = runs(None, chosen, edits, size, steps)
    plain: Runs | None = None
    for weight_format in formats:
        found = runs(weight_format, chosen, edits, size, steps)
        plain = plain or found
        yield {
            "kind": "drift",
            "format": weight_format,
            "runs": len(found),
            "size": list(size),
            "steps": steps,
            **_compare(found, exact),
            "embeds_least_cosine": min(float(least) for least in _cosines(found, plain)),
        }


def _compare(found: Runs, exact: Runs) -> dict[str, float]:
    def each(measure: Callable[[Outcome, Outcome], float]) -> list[float]:
        return [measure(found[key], exact[key]) for key in exact]

    signal = each(lambda a, b: psnr(a.pixels, b.pixels))
    alike = each(lambda a, b: ssim(a.pixels, b.pixels))
    apart = each(lambda a, b: error(a.latents, b.latents))
    return {
        "psnr": mean(signal),
        "least_psnr": min(signal),
        "ssim": mean(alike),
        "least_ssim": min(alike),
        "latents_relative_l2": mean(apart),
        "largest_latents_relative_l2": max(apart),
    }


def _cosines(found: Runs, plain: Runs) -> list[torch.Tensor]:
    """The least cosine of any token's embedding, per run."""
    return [F.cosine_similarity(found[key].embeds, plain[key].embeds, dim=-1).min() for key in plain]
