"""What a request says of keeping, checked against the sizes of its run; before a weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...errors import InputError, RequestError
from ..picture import Picture, load_mask
from .options import Keep

if TYPE_CHECKING:
    from ..job import Geometry


def resolve_mask(
    keep: Keep, *, picture_size: tuple[int, int] | None, target: Geometry, reference: Geometry | None
) -> Picture | None:
    """The mask at the size of the output, mode L, or None where the rule is none or a change mask.

    Args:
        keep: the options.
        picture_size: (width, height) of the first picture as it was loaded; None where there is no picture.
        target: geometry of the output.
        reference: geometry of the first picture as the VAE sees it.

    Raises:
        RequestError: there is no picture, it is not seen at the size of the output, or the blur is wider than it.
        InputError: the mask cannot be read, has another size than picture and output, or is black everywhere.
    """
    if keep.rule is None:
        return None
    _check_grids(keep, target, reference)
    if keep.mask is None or picture_size is None:
        return None
    mask = load_mask(keep.mask)
    size = target.width, target.height
    if mask.image.size not in (picture_size, size):
        raise InputError(
            f"{mask.label} must be {_by(picture_size)} as the first picture is, got {_by(mask.image.size)}",
            hint="make the mask on a copy of the picture",
        )
    if not np.asarray(mask.image).any():
        raise InputError(
            f"{mask.label} must be white where something is to change, got black everywhere",
            hint="paint the region of change white",
        )
    if mask.image.size == size:
        return mask
    image = mask.image.resize(size, Image.Resampling.BOX)
    note = f"{mask.label}: resized from {_by(mask.image.size)} to {_by(size)} with the picture"
    return Picture(image, mask.sha256, mask.label, (*mask.notes, note))


def _check_grids(keep: Keep, target: Geometry, reference: Geometry | None) -> None:
    if reference is None:
        raise RequestError("masks and RCM must have a picture to keep, got none", hint="edit a picture")
    if reference.grid != target.grid:
        raise RequestError(
            f"masks and RCM must have the picture at the size of the output, got {reference.width}x{reference.height} "
            f"for {target.width}x{target.height}",
            hint="--resize-control image",
        )
    least = 2 * min(target.grid)
    if keep.rule != "mask" and max(keep.rcm_kernel_size, 1) // 2 >= least:
        raise RequestError(
            f"rcm_kernel_size must be below {2 * least} for {target.width}x{target.height}, got {keep.rcm_kernel_size}",
            hint="--rcm-kernel-size 3",
        )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
