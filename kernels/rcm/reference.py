"""The definition in float32 torch; the order of every sum is fixed, so that other implementations can give its bits."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def weights(kernel_size: int) -> tuple[float, ...]:
    """``exp(-(i - (k - 1) / 2)^2 / 2 sigma^2)``, summing to 1, each rounded to float32; k is ``kernel_size | 1``.

    ``sigma = 0.3 ((k - 1) / 2 - 1) + 0.8``. A size of 1 or less gives the one weight 1: no blur.
    """
    size = kernel_size | 1 if kernel_size > 1 else 1
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    bell = [math.exp(-0.5 * ((i - size // 2) / sigma) ** 2) for i in range(size)]
    return tuple(torch.tensor([value / math.fsum(bell) for value in bell], dtype=torch.float32).tolist())


def distance(x: torch.Tensor, control: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """``mean_c |blur(x - control)|`` [h, w]: the blur is linear, so one serves for both.

    Along the width first, then along the height; taps and channels are added in rising order.

    Args:
        x: float32 [C, h, w].
        control: float32 [C, h, w].
        kernel_size: of the Gaussian, reflected at the edges.
    """
    taps = weights(kernel_size)
    half = len(taps) // 2
    height, width = x.shape[-2:]
    wide = functional.pad(x - control, (half, half, 0, 0), mode="reflect")
    flat = sum(tap * wide[..., i : i + width] for i, tap in enumerate(taps))
    tall = functional.pad(torch.as_tensor(flat), (0, 0, half, half), mode="reflect")
    blurred = sum(tap * tall[:, i : i + height] for i, tap in enumerate(taps))
    return torch.as_tensor(sum(plane.abs() for plane in torch.as_tensor(blurred))) / len(x)


def change_mask(
    x: torch.Tensor, control: torch.Tensor, threshold: float, relative: bool, kernel_size: int, dilate_size: int
) -> torch.Tensor:
    """See ``kernels.rcm.change_mask``."""
    change = distance(x.reshape(x.shape[-3:]), control.reshape(x.shape[-3:]), kernel_size)
    least = threshold * change.amax() if relative else change.new_full((), threshold)
    finite = (change - change) + (least - least)
    mask = (change >= least).float() + finite
    tokens = functional.avg_pool2d(mask[None], 2)
    return functional.max_pool2d(tokens, 2 * dilate_size + 1, stride=1, padding=dilate_size)[0]
