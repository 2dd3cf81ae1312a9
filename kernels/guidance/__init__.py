"""True classifier-free guidance with the norm of the positive prediction."""

from __future__ import annotations

import math
from importlib import import_module

import torch

from ...errors import KernelError

__all__ = ["IMPLEMENTATIONS", "MAX_CHANNELS", "combine"]

IMPLEMENTATIONS = ("reference", "triton")
MAX_CHANNELS = 8192


def combine(
    positive: torch.Tensor, negative: torch.Tensor, scale: float, *, implementation: str = "reference"
) -> torch.Tensor:
    """``c = n + scale * (p - n)``, then per token ``c * |p| / |c|`` over the channels; where ``|c| = 0`` it stays 0.

    NaN and infinity are not looked for: a value that is NaN in ``c`` is NaN in the result.

    Args:
        positive: velocity of the prompt, float32 [..., C].
        negative: velocity of the negative prompt, same shape.
        scale: ``true_cfg_scale``.
        implementation: ``reference`` or ``triton``.

    Returns:
        float32 [..., C].

    Raises:
        KernelError: wrong dtype, shape, device or implementation, no tokens, or a scale that is not finite.

    Source: huggingface/diffusers@v0.42.1:src/diffusers/pipelines/qwenimage/pipeline_qwenimage_edit_plus.py, which
    divides by zero where ours keeps zero.
    """
    if positive.dtype != torch.float32 or not positive.numel() or not 1 <= positive.shape[-1] <= MAX_CHANNELS:
        raise KernelError(f"positive must be float32 [..., 1 to {MAX_CHANNELS} channels], got {_say(positive)}")
    if negative.dtype != positive.dtype or negative.shape != positive.shape or negative.device != positive.device:
        raise KernelError(f"negative must be {_say(positive)} like positive, got {_say(negative)}")
    if not math.isfinite(scale):
        raise KernelError(f"scale must be finite, got {scale}")
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return import_module(f".{implementation}", __name__).combine(positive, negative, scale)


def _say(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
