"""Iterative refinement: the picture that was made is the next reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...errors import RequestError
from .knobs import BlendKnobs, check_share
from .presets import STRENGTH

Image = TypeVar("Image")


@dataclass(frozen=True)
class Round:
    """What one round is made with.

    Attributes:
        index: from 0.
        alpha: share of the picture.
        strength: of the noise on the initial picture.
        seed: of the noise.
    """

    index: int
    alpha: float
    strength: float
    seed: int


def rounds(
    count: int,
    alpha: float | Sequence[float] = BlendKnobs.alpha,
    strength: float | Sequence[float] = STRENGTH,
    seed: int | Sequence[int] = 42,
) -> tuple[Round, ...]:
    """One setting per round, each given once for all or once per round.

    Raises:
        RequestError: a list is not one value per round, a share is out of range, or there are no rounds.
    """
    if count < 1:
        raise RequestError(f"rounds must be at least 1, got {count}")
    alphas = [check_share("alpha", value) for value in _each(alpha, count, "alphas")]
    strengths = [check_share("strength", value) for value in _each(strength, count, "strengths")]
    seeds = _each(seed, count, "seeds")
    made = zip(range(count), alphas, strengths, seeds, strict=True)
    return tuple(Round(index, share, noise, int(number)) for index, share, noise, number in made)


def refine(image: Image, make: Callable[[Image, Round], Image], settings: Sequence[Round]) -> Iterator[Image]:
    """Yield the picture of each round; the reference of the first is `image`, of each later one the picture before.

    Args:
        image: the first reference.
        make: makes a picture from a reference.
        settings: of :func:`rounds`.
    """
    for setting in settings:
        image = make(image, setting)
        yield image


def _each(value: float | Sequence[float], count: int, subject: str) -> list[float]:
    if isinstance(value, (int, float)):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{subject} must be one for all {count} rounds or one per round, got {len(value)}")
    return list(value)
