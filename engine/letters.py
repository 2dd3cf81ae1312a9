"""Words on pictures, in the one font that comes with Pillow."""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import ImageFont

_ELLIPSIS = "..."


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font; ``size`` in pixels."""
    return ImageFont.load_default(size)


def shown(text: str) -> str:
    """A text in the letters that the font has: accents are dropped, what has no plain form becomes a question mark."""
    plain = "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))
    return " ".join(plain.encode("ascii", "replace").decode().split())


def width_of(text: str, size: int) -> int:
    """Pixels from left to right."""
    return -(-int(font(size).getlength(text) * 64) // 64)


def line_pixels(size: int) -> int:
    """Pixels from one line to the next."""
    return size + -(-size // 3)


def cut(text: str, size: int, width: int) -> str:
    """As much of a text as goes into ``width`` pixels, with dots where some is missing."""
    if width_of(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = width_of(text[:middle].rstrip() + _ELLIPSIS, size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + _ELLIPSIS if low else ""


def wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """A text in at most ``lines`` lines of ``width`` pixels; the last ends in dots where some is missing."""
    found: list[str] = []
    words = text.split()
    while words and len(found) < lines - 1:
        count = next((n for n in range(len(words), 0, -1) if width_of(" ".join(words[:n]), size) <= width), 1)
        found.append(cut(" ".join(words[:count]), size, width))
        words = words[count:]
    if words:
        found.append(cut(" ".join(words), size, width))
    return found
