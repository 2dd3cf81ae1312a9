"""Sizes of the output, and of the pictures as the VAE and the vision tower see them. No picture is cropped."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RequestError
from .defaults import Defaults
from .picture import calculate_dimensions

Size = tuple[int, int]

AREA_SLACK = 0.03
COARSE_PIXELS, FINE_PIXELS = 32, 16


def target_size(asked: Size | None, pictures: Sequence[Size], defaults: Defaults) -> Size:
    """(width, height) of the output: as asked, to the pixel; else the model's area in the shape of its lead picture.

    Args:
        asked: what the request says.
        pictures: sizes of the pictures, upright.
        defaults: of the model; they say whether the first or the last picture leads.
    """
    if asked is not None:
        return asked
    if not pictures:
        side = round(defaults.area_pixels**0.5)
        return side, side
    width, height = pictures[-1 if defaults.size_from_last else 0]
    return calculate_dimensions(defaults.area_pixels, width / height)


def reference_size(picture: Size, target: Size, how: str | None, defaults: Defaults) -> Size:
    """(width, height) at which the VAE sees a picture.

    It is scaled to that size and, where it is not a multiple of the token's pixels, its right and lower edges are
    repeated up to one; nothing is cut off.

    - ``image``: that of the output.
    - ``official``: see :func:`official_size`.
    - ``none``: its own; it is not resampled. musubi-tuner scales it down to multiples of 16.
    - None: the model's habit, its area in multiples of 32, or that of the output.

    Args:
        picture: (width, height), upright.
        target: (width, height) of the output.
        how: ``--resize-control``.
        defaults: of the model.

    Raises:
        RequestError: an unknown way.
    """
    if how == "image":
        return target
    if how == "none":
        return picture
    if how == "official":
        return official_size(picture, defaults.reference_area_pixels or defaults.area_pixels)
    if how is not None:
        raise RequestError(f"resize_control must be image, official or none, got {how!r}")
    if defaults.reference_area_pixels is None:
        return target
    return calculate_dimensions(defaults.reference_area_pixels, picture[0] / picture[1])


def official_size(picture: Size, area: int) -> Size:
    """The area in the picture's shape, in multiples of 32; of 16 where those miss the area by more than 3 %.

    Args:
        picture: (width, height).
        area: in pixels.
    """
    ratio = picture[0] / picture[1]
    width, height = calculate_dimensions(area, ratio, COARSE_PIXELS)
    if abs(width * height / area - 1) <= AREA_SLACK:
        return width, height
    return calculate_dimensions(area, ratio, FINE_PIXELS)


def condition_size(picture: Size, defaults: Defaults) -> Size:
    """(width, height) at which the vision tower sees a picture: the model's area for it, whatever the VAE sees."""
    return calculate_dimensions(defaults.condition_area_pixels, picture[0] / picture[1])
