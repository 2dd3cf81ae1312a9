"""Masks between pixels and tokens, and the composite of the finished picture with the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from ..job import Geometry

PEAK = 255


def token_mask(mask: Image.Image, target: Geometry, sampling: str) -> torch.Tensor:
    """Share of change of each token, float32 [rows, columns], 0 to 1.

    The mask's right and lower edges are repeated up to whole tokens, as the picture's are.

    Args:
        mask: mode L, of the size of the target.
        target: size and token grid.
        sampling: ``area``, the mean over the token's pixels; ``bilinear``, the four about its middle.
    """
    padded = _padded(np.asarray(mask), target)
    rows, columns = target.grid
    if sampling == "bilinear":
        shares = torch.from_numpy(padded.astype(np.float32) / PEAK)
        return F.interpolate(shares[None, None], (rows, columns), mode="bilinear", align_corners=False)[0, 0]
    side = target.multiple
    sums = padded.astype(np.int64).reshape(rows, side, columns, side).sum(axis=(1, 3))
    return torch.from_numpy((sums / (PEAK * side * side)).astype(np.float32))


def _padded(values: NDArray[np.uint8], target: Geometry) -> NDArray[np.uint8]:
    width, height = target.padded
    return np.pad(values, ((0, height - target.height), (0, width - target.width)), mode="edge")


def pixel_mask(changed: torch.Tensor, target: Geometry) -> NDArray[np.uint8]:
    """255 on the pixels of the tokens that changed: bool [rows, columns] to [height, width]."""
    values = np.kron(changed.cpu().numpy().astype(np.uint8) * PEAK, np.ones((target.multiple,) * 2, dtype=np.uint8))
    return values[: target.height, : target.width]


def feather(mask: NDArray[np.uint8], pixels: int) -> NDArray[np.float32]:
    """``mask / 255 * min(1, d / (pixels + 1))``, d the distance in pixels to the nearest pixel where the mask is 0.

    So it is 0 wherever the mask is, 1 from ``pixels + 1`` on, and the border of the picture is no border of the mask.

    Args:
        mask: [height, width].
        pixels: width of the soft edge, at least 0.
    """
    distance = _distance(mask > 0, pixels + 1)
    return (mask / PEAK * np.minimum(distance / (pixels + 1), 1)).astype(np.float32)


def _distance(inside: NDArray[np.bool_], most: int) -> NDArray[np.float64]:
    """Euclidean distance to the nearest False, cut off at ``most``: along the columns first, then along the rows."""
    height, width = inside.shape
    most = min(most, height + width)
    row = np.arange(height)[:, None]
    above = np.maximum.accumulate(np.where(inside, -(height + width), row), axis=0)
    below = np.minimum.accumulate(np.where(inside, 2 * height + width, row)[::-1], axis=0)[::-1]
    column = np.minimum(np.minimum(row - above, below - row), most).astype(np.float64) ** 2
    nearest = column.copy()
    for step in range(1, min(most, width)):
        away = column + step * step
        np.minimum(nearest[:, step:], away[:, :-step], out=nearest[:, step:])
        np.minimum(nearest[:, :-step], away[:, step:], out=nearest[:, :-step])
    return np.sqrt(nearest)


def blend(edited: Image.Image, original: Image.Image, weights: NDArray[np.float32]) -> Image.Image:
    """``round(w * edited + (1 - w) * original)`` of 8-bit values; exactly one of them where w is 0 or 1.

    Args:
        edited: mode RGB.
        original: mode RGB, of the same size.
        weights: [height, width], 0 to 1.
    """
    shares = weights[..., None]
    one, other = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (edited, original))
    return Image.fromarray((shares * one + (1 - shares) * other).round().astype(np.uint8))


def debug_picture(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """The mask of a step as a picture of mode L: white where the edit has a free hand, token by token.

    Args:
        mask: float32 [rows, columns], 0 to 1, as a ``Step`` carries it.
        size: (width, height) of the output.
    """
    values = (mask.cpu().numpy() * PEAK).round().astype(np.uint8)
    rows, columns = values.shape
    side = max(-(-size[0] // columns), -(-size[1] // rows))
    return Image.fromarray(np.kron(values, np.ones((side, side), dtype=np.uint8))[: size[1], : size[0]])
