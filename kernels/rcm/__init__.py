"""Where an edit changes the picture: the change mask of two latents (RCM)."""

from __future__ import annotations

import math
from importlib import import_module

import torch

from ...errors import KernelError

__all__ = ["change_mask"]

IMPLEMENTATIONS = ("reference", "triton", "native")


def change_mask(
    x: torch.Tensor,
    control: torch.Tensor,
    *,
    threshold: float,
    relative: bool = False,
    kernel_size: int = 3,
    dilate_size: int = 0,
    implementation: str = "reference",
) -> torch.Tensor:
    """1 where x differs from control by the threshold or more, 0 where it does not, shares in between, by token.

    ``d = mean_c |blur(x) - blur(control)|``, ``m = d >= threshold`` or, relative, ``d >= threshold * max(d)``; the mean
    of m over each 2 x 2 latent pixels; then the largest of the ``(2 dilate_size + 1)^2`` tokens around each. The blur
    is Gaussian, ``sigma = 0.3 ((k - 1) / 2 - 1) + 0.8``, reflected at the edges. Where x equals control everywhere a
    relative threshold is 0, and the mask all 1. Nothing waits for the device.

    Args:
        x: float32 [C, h, w] or [1, C, h, w], unpacked latents, any strides; h and w even.
        control: float32, shaped as x.
        threshold: at least 0; a share of the largest d where ``relative``.
        relative: whether the threshold is a share.
        kernel_size: of the blur in latent pixels, made odd by adding 1; 1 or less for none.
        dilate_size: tokens by which the mask grows on each side.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        float32 [h / 2, w / 2]. On a CUDA device an input that is not finite gives NaN wherever the blur and the
        dilation carry it, everywhere where ``relative``.

    Raises:
        KernelError: wrong dtype, shape, device or option; on a CPU also a value that is not finite.

    Source: kohya-ss/musubi-tuner@30c658c:src/musubi_tuner/qwen_image_generate_image.py; there
        each latent is blurred by itself, here their difference once: d is the same but for float32 rounding.
    """
    _check_latents("x", x)
    _check_latents("control", control)
    if x.shape != control.shape or x.device != control.device:
        wanted, found = (f"{list(latents.shape)} on {latents.device}" for latents in (x, control))
        raise KernelError(f"control must be {wanted} as x is, got {found}")
    if not 0 <= threshold < math.inf:
        raise KernelError(f"threshold must be at least 0 and finite, got {threshold}")
    if dilate_size < 0:
        raise KernelError(f"dilate_size must be at least 0, got {dilate_size}")
    if max(kernel_size, 1) // 2 >= min(x.shape[-2:]):
        raise KernelError(
            f"kernel_size must be below {2 * min(x.shape[-2:])} for latents {list(x.shape)}, got {kernel_size}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    run = import_module(f".{implementation}", __name__).change_mask
    return run(x, control, threshold, relative, kernel_size, dilate_size)


def _check_latents(subject: str, latents: torch.Tensor) -> None:
    if latents.dtype != torch.float32:
        raise KernelError(f"{subject} must be float32, got {str(latents.dtype).removeprefix('torch.')}")
    shape = list(latents.shape)
    if len(shape) not in (3, 4) or not latents.numel() or (len(shape) == 4 and shape[0] != 1):
        raise KernelError(f"{subject} must be latents [channels, height, width] that are not empty, got shape {shape}")
    if shape[-1] % 2 or shape[-2] % 2:
        raise KernelError(f"{subject} must have an even height and width, got shape {shape}")
    if latents.device.type == "cpu" and not all(map(math.isfinite, latents.aminmax())):
        place = (~latents.isfinite()).nonzero()[0].tolist()
        raise KernelError(f"{subject} must be finite, got {float(latents[*place])} at {place}")
