"""Image tokens that no other token may see: their choice, and the sequence without them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch

from ...errors import RequestError
from .language import Sequenced

MaskMode = Literal["attention", "remove"]


def masked_tokens(tokens: Sequence[int], count: int) -> frozenset[int]:
    """The chosen image tokens of `count`.

    Raises:
        RequestError: one is not there, or none would be left.
    """
    chosen = frozenset(int(token) for token in tokens)
    strange = sorted(token for token in chosen if not 0 <= token < count)
    if strange or (count and len(chosen) == count):
        got = f"{strange[0]}" if strange else "all of them"
        raise RequestError(f"mask_tokens must be some of {count} image tokens, counted from 0, got {got}")
    return chosen


def kept_tokens(is_image: torch.Tensor, removed: Collection[int]) -> torch.Tensor:
    """Which tokens stay, bool [S]."""
    kept = torch.ones(len(is_image), dtype=torch.bool)
    kept[is_image.nonzero().flatten()[sorted(removed)]] = False
    return kept


def without(sequence: Sequenced, kept: torch.Tensor) -> Sequenced:
    """The sequence without the tokens that do not stay; those that do keep their positions."""
    if bool(kept.all()):
        return sequence
    stay = kept.to(sequence.hidden.device)
    image = stay[sequence.image_rows]
    places = (stay.cumsum(0) - 1)[sequence.image_rows[image]]
    deepstack = tuple(rows[image] for rows in sequence.deepstack)
    return Sequenced(sequence.hidden[stay], sequence.positions[:, kept], places, deepstack)


def region_tokens(grid_thw: torch.Tensor, box: tuple[float, float, float, float], *, picture: int = 0) -> list[int]:
    """Image tokens whose tile lies in a box, at least partly, counted over all pictures.

    Args:
        grid_thw: frames, rows and columns of patches per picture [n, 3]; four patches are one token.
        box: left, top, right and bottom as shares of the picture, 0 to 1.
        picture: which picture, from 0.

    Raises:
        RequestError: no such picture, or the box is not one.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1) or not 0 <= picture < len(grid_thw):
        raise RequestError(
            f"region must be left, top, right, bottom from 0 to 1 of a picture below {len(grid_thw)}, "
            f"got {box} of {picture}"
        )
    sizes = [(rows // 2, columns // 2) for _, rows, columns in grid_thw.tolist()]
    first = sum(rows * columns for rows, columns in sizes[:picture])
    rows, columns = sizes[picture]
    return [
        first + row * columns + column
        for row in range(rows)
        for column in range(columns)
        if left * columns < column + 1 and column < right * columns and top * rows < row + 1 and row < bottom * rows
    ]
