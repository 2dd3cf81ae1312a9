"""The true edits: what each instruction means, exactly, in pixels.

The tiny model is measured against these functions, so they are written to lie well apart: between any two of them a
colourful photo differs by much more than the model's own error. All are per pixel except `blur` and `pixelate`, whose
radius and block are fixed in output pixels so that the model can learn them at any size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)
BLOCK_PIXELS = 8
BLUR_PIXELS = 9


def _per_channel(values: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(values).view(3, 1, 1)


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * _per_channel(LUMA)).sum(-3, keepdim=True)


def _gain(red: float, green: float, blue: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * _per_channel((red, green, blue))).clamp(0, 1)

    return edit


def _tint(red: float, green: float, blue: float, amount: float = 0.45) -> Callable[[torch.Tensor], torch.Tensor]:
    def edit(pixels: torch.Tensor) -> torch.Tensor:
        return (1 - amount) * pixels + amount * _per_channel((red, green, blue))

    return edit


def _keep(pixels: torch.Tensor) -> torch.Tensor:
    return pixels


def _grayscale(pixels: torch.Tensor) -> torch.Tensor:
    return _luma(pixels).expand_as(pixels)


def _invert(pixels: torch.Tensor) -> torch.Tensor:
    return 1 - pixels


def _bright(pixels: torch.Tensor) -> torch.Tensor:
    return 1 - (1 - pixels) * (1 - 0.5 * pixels) * 0.7


def _sepia(pixels: torch.Tensor) -> torch.Tensor:
    return (_luma(pixels) * _per_channel((1.05, 0.83, 0.58)) + _per_channel((0.05, 0.02, 0.0))).clamp(0, 1)


def _swap(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.flip(-3)


def _contrast(pixels: torch.Tensor) -> torch.Tensor:
    return 0.5 + 0.5 * torch.tanh(2.6 * (pixels - 0.5)) / torch.tanh(torch.tensor(1.3))


def _blur(pixels: torch.Tensor) -> torch.Tensor:
    """Binomial-like blur: two box filters of 9 pixels, edges replicated."""
    batch = pixels.reshape(-1, 1, *pixels.shape[-2:])
    for _ in range(2):
        batch = F.pad(batch, (BLUR_PIXELS // 2,) * 4, mode="replicate")
        batch = F.avg_pool2d(F.avg_pool2d(batch, (1, BLUR_PIXELS), 1), (BLUR_PIXELS, 1), 1)
    return batch.reshape(pixels.shape)


def _pixelate(pixels: torch.Tensor) -> torch.Tensor:
    """Means of 8 x 8 blocks counted from the top left corner; a block cut by the border keeps its own mean."""
    height, width = pixels.shape[-2:]
    batch = pixels.reshape(-1, 1, height, width)
    means = F.avg_pool2d(batch, BLOCK_PIXELS, ceil_mode=True, count_include_pad=False)
    blocks = means.repeat_interleave(BLOCK_PIXELS, -1).repeat_interleave(BLOCK_PIXELS, -2)
    return blocks[..., :height, :width].reshape(pixels.shape)


EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "keep": _keep,
    "grayscale": _grayscale,
    "invert": _invert,
    "night": _gain(0.22, 0.28, 0.50),
    "bright": _bright,
    "sepia": _sepia,
    "swap": _swap,
    "warm": _gain(1.20, 0.92, 0.50),
    "cool": _gain(0.50, 0.92, 1.20),
    "contrast": _contrast,
    "red": _tint(1, 0, 0),
    "green": _tint(0, 1, 0),
    "blue": _tint(0, 0, 1),
    "blur": _blur,
    "pixelate": _pixelate,
}
NAMES = tuple(EDITS)


def apply(name: str, pixels: torch.Tensor) -> torch.Tensor:
    """The true result of one edit.

    Args:
        name: A key of `EDITS`.
        pixels: RGB in [0, 1], [..., 3, h, w].

    Returns:
        RGB in [0, 1], same shape.
    """
    return EDITS[name](pixels)
