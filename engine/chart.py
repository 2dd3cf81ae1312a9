"""Axes on a picture: logarithmic scales, ticks, points and lines, at twice the size so that edges come out smooth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .letters import font, shown, width_of

Array = NDArray[np.float64]
Colour = tuple[int, int, int]
FINE = 2
"""Pixels drawn for one that is kept, each way."""

INK, GREY, FAINT, PAPER = (25, 25, 25), (110, 110, 110), (226, 226, 226), (255, 255, 255)
DASH_PIXELS = 7


@dataclass(frozen=True)
class Scale:
    """``first + (last - first) * log(value / low) / log(high / low)``; values outside are brought to the ends.

    Attributes:
        low: value at ``first``, above 0.
        high: value at ``last``.
        first: pixel.
        last: pixel.
    """

    low: float
    high: float
    first: float
    last: float

    def at(self, values: Array) -> Array:
        """Pixels of values."""
        share = np.log(np.clip(values, self.low, self.high) / self.low) / math.log(self.high / self.low)
        return self.first + (self.last - self.first) * share

    def ticks(self) -> list[float]:
        """Powers of ten, and 2 and 5 times them where there are few."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if math.log10(self.high / self.low) <= 2.5 else (1,)
        made = [step * 10.0**power for power in decades for step in steps]
        return [value for value in made if self.low * 0.999 <= value <= self.high * 1.001]


def around(values: Iterable[Array], least: float = 1e-6) -> tuple[float, float]:
    """Limits around all positive values, a little beyond the smallest and the largest and at least a decade apart."""
    found = np.concatenate([np.empty(0), *(np.ravel(each) for each in values)])
    found = found[np.isfinite(found) & (found > least)]
    low, high = (float(found.min()), float(found.max())) if len(found) else (1.0, 1.0)
    low, high = low / 2, high * 2.5
    missing = max(1.0, 10 / (high / low)) ** 0.5
    return low / missing, high * missing


@dataclass
class Canvas:
    """A white picture to draw on, in its final pixels.

    Args:
        width: in pixels.
        height: in pixels.
    """

    width: int
    height: int
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._image = Image.new("RGB", (self.width * FINE, self.height * FINE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def finished(self) -> Image.Image:
        """The picture."""
        return self._image.resize((self.width, self.height), Image.Resampling.BOX)

    def text(self, x: float, y: float, words: str, size: int, colour: Colour = INK, anchor: str = "la") -> None:
        """Write one line; the anchor is Pillow's."""
        self._draw.text((x * FINE, y * FINE), shown(words), colour, font(size * FINE), anchor=anchor)

    def upright(self, x: float, y: float, words: str, size: int) -> None:
        """Write one line that runs upwards, its middle at (x, y)."""
        wide, tall = width_of(shown(words), size * FINE) + 4, size * FINE * 2
        label = Image.new("L", (wide, tall), 0)
        ImageDraw.Draw(label).text((wide / 2, tall / 2), shown(words), 255, font(size * FINE), anchor="mm")
        turned = label.transpose(Image.Transpose.ROTATE_90)
        corner = round(x * FINE - turned.width / 2), round(y * FINE - turned.height / 2)
        self._image.paste(INK, (*corner, corner[0] + turned.width, corner[1] + turned.height), turned)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1) -> None:
        """Join points."""
        self._draw.line([(x * FINE, y * FINE) for x, y in points], colour, round(width * FINE), joint="curve")

    def dashes(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        """Join points by a broken line."""
        on = 0.0
        for (x, y), (right, below) in zip(points, points[1:], strict=False):
            length = math.hypot(right - x, below - y)
            if on % (2 * DASH_PIXELS) < DASH_PIXELS:
                self.line([(x, y), (right, below)], colour)
            on += length

    def dots(self, xs: Array, ys: Array, colour: Colour, radius: float = 1.5) -> None:
        """A disc at each point."""
        reach = radius * FINE
        for x, y in zip((xs * FINE).tolist(), (ys * FINE).tolist(), strict=True):
            self._draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=colour)

    def ring(self, x: float, y: float, colour: Colour, radius: float = 5) -> None:
        """A circle around a point."""
        box = ((x - radius) * FINE, (y - radius) * FINE, (x + radius) * FINE, (y + radius) * FINE)
        self._draw.ellipse(box, outline=colour, width=round(1.5 * FINE))
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def label(self, x: float, y: float, words: str, size: int, colour: Colour) -> bool:
        """Write a word near a point where nothing was labelled yet; False where there is no room."""
        wide, tall = width_of(words, size) + 2, size - 2
        for right, below in ((0, -1), (1, 0), (-1, 0), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1), (0, -2), (0, 2)):
            middle = x + right * (wide / 2 + 8), y + below * (tall / 2 + 8)
            box = (middle[0] - wide / 2, middle[1] - tall / 2, middle[0] + wide / 2, middle[1] + tall / 2)
            if not any(_meet(box, other) for other in self.taken):
                self.taken.append(box)
                self._draw.rectangle([edge * FINE for edge in box], fill=PAPER)
                self.text(*middle, words, size, colour, "mm")
                return True
        return False


def axes(canvas: Canvas, x: Scale, y: Scale, names: tuple[str, str]) -> None:
    """Frame, grid lines, ticks with their values, and what is measured along the two axes."""
    for value in x.ticks():
        (place,) = x.at(np.array([value]))
        canvas.line([(place, y.first), (place, y.last)], FAINT)
        canvas.line([(place, y.first), (place, y.first + 5)], INK)
        canvas.text(place, y.first + 9, f"{value:g}", 14, INK, "ma")
    for value in y.ticks():
        (place,) = y.at(np.array([value]))
        canvas.line([(x.first, place), (x.last, place)], FAINT)
        canvas.line([(x.first - 5, place), (x.first, place)], INK)
        canvas.text(x.first - 9, place, f"{value:g}", 14, INK, "rm")
    corners = [(x.first, y.first), (x.last, y.first), (x.last, y.last), (x.first, y.last), (x.first, y.first)]
    canvas.line(corners, GREY)
    canvas.text((x.first + x.last) / 2, y.first + 28, names[0], 15, INK, "ma")
    canvas.upright(x.first - 66, (y.first + y.last) / 2, names[1], 15)


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
