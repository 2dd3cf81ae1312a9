"""What a request says of its references, checked against its pictures; before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ...errors import InputError
from ..picture import Picture, load_mask
from .options import Reference, StepReference

GREY = (128, 128, 128)
WHITE = 255

Masks = tuple[Picture | None, ...]


def resolve_masks(reference: Reference, pictures: Sequence[Picture]) -> Masks:
    """One mask per picture, mode L at the picture's own size; None where all of the picture is a reference.

    Raises:
        InputError: a mask cannot be read or has another size than its picture.
    """
    given = reference.masks or (None,) * len(pictures)
    return tuple(None if mask is None else _mask(mask, picture) for mask, picture in zip(given, pictures, strict=True))


def _mask(source: object, picture: Picture) -> Picture | None:
    mask = load_mask(source)  # pyright: ignore[reportArgumentType]
    if mask.image.size != picture.image.size:
        wanted, got = (f"{image.width}x{image.height}" for image in (picture.image, mask.image))
        raise InputError(
            f"{mask.label} must be {wanted} as {picture.label} is, got {got}",
            hint="make the mask on a copy of the picture",
        )
    return None if int(np.asarray(mask.image).min()) == WHITE else mask


def resolve_table(reference: Reference, steps: int, masks: Masks) -> tuple[StepReference, ...]:
    """What the references do in each step; a picture behind a black mask has strength 0.

    Raises:
        RequestError: the strengths fit neither the pictures nor the steps.
    """
    there = [mask is None or bool(np.asarray(mask.image).any()) for mask in masks]
    table = reference.table(steps, len(masks))
    return tuple(
        replace(step, strengths=tuple(s if here else 0.0 for s, here in zip(step.strengths, there, strict=True)))
        for step in table
    )


def veil(image: Image.Image, mask: Picture | None) -> Image.Image:
    """The picture, grey where its mask is black."""
    return image if mask is None else Image.composite(image, Image.new("RGB", image.size, GREY), mask.image)
