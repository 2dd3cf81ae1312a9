"""The native change mask: ``qengine_change_mask`` of the C++ library, the bits of the reference."""

from __future__ import annotations

import ctypes

import torch

from ...errors import KernelError
from .. import native
from .reference import weights


def change_mask(
    x: torch.Tensor,
    control: torch.Tensor,
    threshold: float,
    relative: bool,
    kernel_size: int,
    dilate_size: int,
    threads: int | None = None,
    *,
    isa: str = "best",
) -> torch.Tensor:
    """See ``kernels.rcm.change_mask``."""
    x, control = _planes("x", x), _planes("control", control)
    if x.shape != control.shape:
        raise KernelError(f"control must be {list(x.shape)} as x is, got {list(control.shape)}")
    channels, height, width = x.shape
    if height % 2 or width % 2 or max(kernel_size, 1) // 2 >= min(height, width) or dilate_size < 0:
        raise KernelError(
            f"height and width must be even and above half the kernel, and the dilation 0 or more, got "
            f"[{height}, {width}], {kernel_size} and {dilate_size}"
        )
    taps = torch.tensor(weights(kernel_size), dtype=torch.float32)
    target = torch.empty(height // 2, width // 2)
    shape = (ctypes.c_uint64 * 3)(channels, height, width)
    count, number = native.thread_count(threads), native.isa_number(isa)
    options = len(taps) // 2, threshold, int(relative), dilate_size
    pointers = x.data_ptr(), control.data_ptr(), shape, taps.data_ptr()
    native.call("qengine_change_mask", *pointers, *options, target.data_ptr(), count, number)
    return target


def _planes(subject: str, latents: torch.Tensor) -> torch.Tensor:
    shape = list(latents.shape)
    if latents.dtype != torch.float32 or latents.device.type != "cpu":
        raise KernelError(f"{subject} must be float32 on the CPU, got {latents.dtype} on {latents.device}")
    if len(shape) not in (3, 4) or not latents.numel() or (len(shape) == 4 and shape[0] != 1):
        raise KernelError(f"{subject} must be latents [channels, height, width] that are not empty, got shape {shape}")
    return latents.reshape(shape[-3:]).contiguous()
