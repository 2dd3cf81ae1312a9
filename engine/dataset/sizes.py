"""Sizes at which the pictures of a dataset are encoded, and how they are brought to them.

Source: kohya-ss/musubi-tuner, docs/dataset_config.md and the behaviour of its bucket selector: sides are multiples of
16, a picture covers its size and the rest is cut off evenly. We shrink by Pillow's box filter, which averages areas as
OpenCV's INTER_AREA does but for its rounding.
"""

from __future__ import annotations

import math

from PIL import Image

from ...errors import InputError
from .config import STEP, Dataset

Size = tuple[int, int]


def bucket(picture: Size, dataset: Dataset) -> Size:
    """(width, height) at which a picture of a dataset is encoded.

    Without buckets the resolution. With buckets: of all widths from half the square root of the area up to it, in
    steps, each with the largest height that the area allows, upright and turned, the one nearest in shape; a picture
    of less area keeps its size where ``bucket_no_upscale`` says so, down to multiples of 16.

    Args:
        picture: (width, height).
        dataset: its settings.

    Raises:
        InputError: the picture is too small.
    """
    width, height = dataset.resolution
    if not dataset.enable_bucket:
        return width, height
    area = width * height
    if dataset.bucket_no_upscale and picture[0] * picture[1] <= area:
        return _whole(picture)
    side = math.isqrt(area)
    widths = range(max(STEP, _down(side // 2)), side + STEP, STEP)
    known = {size for w in widths for h in [_down(area // w)] if h for size in ((w, h), (h, w))}
    return min(sorted(known), key=lambda size: abs(size[0] / size[1] - picture[0] / picture[1]))


def control_size(control: Size, target: Size, dataset: Dataset) -> Size:
    """(width, height) at which a control is encoded: its picture's size, unless the dataset says otherwise.

    Args:
        control: (width, height).
        target: of the picture that it belongs to, as encoded.
        dataset: its settings.

    Raises:
        InputError: the control is too small.
    """
    most = dataset.control_resolution
    if dataset.no_resize_control and (most is None or control[0] * control[1] <= most[0] * most[1]):
        return _whole(control)
    return target if most is None else nearest(control, most[0] * most[1])


def nearest(picture: Size, area: int) -> Size:
    """The size of at most an area nearest in shape, within two steps of the exact width."""
    ratio = picture[0] / picture[1]
    middle = _down(int(math.sqrt(area * ratio)))
    widths = [width for width in range(middle - 2 * STEP, middle + 2 * STEP + 1, STEP) if width > 0]
    sizes = [(width, _down(area // width)) for width in widths]
    whole = [size for size in sizes if size[1]]
    if not whole:
        raise InputError(f"a picture must be less long than {picture[0]}x{picture[1]} for {area} pixels, got it")
    return min(whole, key=lambda size: abs(size[0] / size[1] - ratio))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The image scaled to cover a size, its middle cut out; Lanczos where it grows, area averages where it shrinks."""
    if image.size == size:
        return image
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (max(low, int(side * scale + 0.5)) for side, low in zip(image.size, size, strict=True))
    filter = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BOX
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    grown = image if (width, height) == image.size else image.resize((width, height), filter)
    return grown.crop((left, top, left + size[0], top + size[1]))


def _down(side: int) -> int:
    return side - side % STEP


def _whole(size: Size) -> Size:
    if min(size) < STEP:
        raise InputError(f"a picture must be at least {STEP} pixels wide and high, got {size[0]}x{size[1]}")
    return _down(size[0]), _down(size[1])
