"""Latents of pictures of 1024 and 2048 pixels, with the blur that is asked for most and the widest one."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from ...kernels import rcm
from ...kernels.rcm.reference import distance, weights
from . import Case, Maker, planned


def _make(
    side: int, kernel_size: int, dilate_size: int, relative: bool, device: torch.device, generator: torch.Generator
) -> Case:
    x, control = torch.randn(2, 16, side, side, device=device, generator=generator)
    exact = distance(x.double(), control.double(), kernel_size)
    least = _gap(exact)
    threshold = least / float(exact.amax()) if relative else least
    implementation = planned("rcm", device)

    def call() -> torch.Tensor:
        return rcm.change_mask(
            *(x, control),
            threshold=threshold,
            relative=relative,
            kernel_size=kernel_size,
            dilate_size=dilate_size,
            implementation=implementation,
        )

    return Case(
        call,
        expected=_tokens(exact >= least, dilate_size),
        eager=lambda: _plain(x, control, threshold, relative, kernel_size, dilate_size),
        limit="copy",
        work=(x.numel() + control.numel() + side * side // 4) * x.element_size(),
        bound=0.0,
        implementation=implementation,
    )


def _gap(exact: torch.Tensor) -> float:
    """A threshold in the widest gap of the middle half, so that no rounding decides about a pixel."""
    values = exact.flatten().sort().values
    middle = values[len(values) // 4 : 3 * len(values) // 4]
    widest = int(middle.diff().argmax())
    return float(middle[widest : widest + 2].mean())


def _tokens(mask: torch.Tensor, dilate_size: int) -> torch.Tensor:
    tokens = functional.avg_pool2d(mask[None].float(), 2)
    return functional.max_pool2d(tokens, 2 * dilate_size + 1, stride=1, padding=dilate_size)[0]


def _plain(
    x: torch.Tensor, control: torch.Tensor, threshold: float, relative: bool, kernel_size: int, dilate_size: int
) -> torch.Tensor:
    """As a torch program does it: a two-dimensional convolution of each of the two latents."""
    taps = torch.tensor(weights(kernel_size), device=x.device)
    kernel = torch.outer(taps, taps).expand(len(x), 1, -1, -1)
    wide = functional.pad(torch.stack((x, control)), (len(taps) // 2,) * 4, mode="reflect")
    blurred = functional.conv2d(wide, kernel, groups=len(x))
    change = (blurred[0] - blurred[1]).abs().mean(dim=0)
    return _tokens(change >= (threshold * change.max() if relative else threshold), dilate_size)


CASES: dict[str, Maker] = {
    f"16x{side}x{side} blur {kernel_size} dilate {dilate_size} {'relative' if relative else 'absolute'}": partial(
        _make, side, kernel_size, dilate_size, relative
    )
    for side, kernel_size, dilate_size, relative in (
        (128, 3, 0, False),
        (128, 3, 2, True),
        (256, 3, 0, True),
        (256, 31, 0, True),
    )
}
"""The work of the limit is both latents read and the mask written, each once."""
