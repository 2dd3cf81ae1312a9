"""Where a running edit changes the picture: musubi-tuner's rule to the bit, and ours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...kernels.rcm import change_mask

LOUD_AT_NONE, LOUD_AT_FULL = 0.8, 0.05
"""Thresholds of our rule at sensitivity 0 and 1, in standard deviations of the picture's latents."""

QUIET_SHARE = 0.5
REACH_TOKENS = 8
MARGIN_TOKENS = 1
LEAST_SCALE = 0.1


def musubi_mask(
    latents: torch.Tensor, control: torch.Tensor, threshold: float, relative: bool, kernel_size: int, dilate_size: int
) -> torch.Tensor:
    """1 where the latents differ from the control, in musubi-tuner's order of operations.

    Each is blurred by itself, ``d = mean_c |blur(x) - blur(c)|``, ``m = d >= t`` or ``d >= t * max(d)``, the product
    rounded once; bilinear to half the size, which is the mean of 2 x 2; then the largest of ``(2 dilate_size + 1)^2``.

    Args:
        latents: float32 [C, h, w], unpacked.
        control: float32 [C, h, w], with the noise of the step.
        threshold: at least 0.
        relative: whether it is a share of the largest d.
        kernel_size: of the Gaussian blur, made odd by adding 1; 1 or less for none.
        dilate_size: tokens.

    Returns:
        float32 [h / 2, w / 2].

    Source: kohya-ss/musubi-tuner@0382db2:src/musubi_tuner/qwen_image_generate_image.py; there in bfloat16, and the
        blur's taps are added in the order that the convolution library picks, here by rows in float32.
    """
    change = (_blur(latents, kernel_size) - _blur(control, kernel_size)).abs().mean(dim=0)
    least = (change.amax().double() * threshold).float() if relative else threshold
    tokens = F.avg_pool2d((change >= least).float()[None], 2)[0]
    return grow(tokens, dilate_size)


def _blur(latents: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Gaussian of ``sigma = 0.3 ((k - 1) / 2 - 1) + 0.8``, reflected at the edges.

    Taps are added one by one and not by a convolution, whose order and precision depend on the device.
    """
    if kernel_size <= 1:
        return latents
    size = kernel_size | 1
    half = size // 2
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    bell = torch.exp(-0.5 * (torch.linspace(-half, half, size) / sigma).pow(2))
    taps = torch.outer(bell / bell.sum(), bell / bell.sum()).tolist()
    height, width = latents.shape[-2:]
    wide = F.pad(latents[None], (half, half, half, half), mode="reflect")[0]
    total = torch.zeros_like(latents)
    for y, row in enumerate(taps):
        for x, tap in enumerate(row):
            total = total + tap * wide[:, y : y + height, x : x + width]
    return total


def scale_of(control: torch.Tensor) -> float:
    """Standard deviation of clean latents, at least 0.1: the unit in which our rule measures change."""
    return max(float(control.std()), LEAST_SCALE) if control.numel() > 1 else 1.0


def threshold_of(sensitivity: float, scale: float) -> float:
    """``0.8 scale (1 / 16)^sensitivity``: the change of a latent pixel that is surely one, 0.8 to 0.05 deviations."""
    return scale * LOUD_AT_NONE * math.pow(LOUD_AT_FULL / LOUD_AT_NONE, sensitivity)


def changed_region(
    predicted: torch.Tensor,
    clean: torch.Tensor,
    *,
    threshold: float,
    kernel_size: int,
    dilate_size: int,
    implementation: str,
) -> torch.Tensor:
    """1 where the predicted clean picture differs from the input picture, 0 elsewhere.

    A token surely changes where ``d = mean_c |blur(predicted - clean)|`` reaches the threshold. The region is those
    tokens, with what reaches half of it and touches them within eight tokens, and ``1 + dilate_size`` tokens around.

    Comparing predicted clean pictures is the difference of the noisy ones freed of the noise level:
    ``predicted - clean = (x - c) - sigma (v - (noise - clean))``. Unlike ``(x - c) / (1 - sigma)`` it does not forget
    a change when x was set back to c one step before, so nothing has to be remembered from step to step.

    Args:
        predicted: float32 [C, h, w], ``x - sigma v``.
        clean: float32 [C, h, w].
        threshold: in units of the latents.
        kernel_size: of the blur.
        dilate_size: tokens.
        implementation: of ``kernels.rcm``.

    Returns:
        float32 [h / 2, w / 2], 0 or 1.
    """
    # A velocity that is not finite is found, and its step thrown away, after this.
    predicted = predicted.nan_to_num()
    surely, perhaps = (
        change_mask(predicted, clean, threshold=t, kernel_size=kernel_size, implementation=implementation) > 0
        for t in (threshold, QUIET_SHARE * threshold)
    )
    region = surely.float()
    for _ in range(REACH_TOKENS):
        region = grow(region, 1) * perhaps
    return grow(region, MARGIN_TOKENS + dilate_size)


def grow(tokens: torch.Tensor, by: int) -> torch.Tensor:
    """The largest of the ``(2 by + 1)^2`` values around each of [rows, columns]."""
    return F.max_pool2d(tokens[None], 2 * by + 1, stride=1, padding=by)[0] if by else tokens
