"""Many pictures in one, in rows and columns with headings, to be compared by eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..errors import RequestError
from .letters import cut, font, line_pixels, shown, width_of, wrap
from .picture import load_picture

MAX_PIXELS = 64 << 20
LEAST_CELL_PIXELS = 16
TITLE_LINES = 3
INK, PAPER, GREY, FAINT = (20, 20, 20), (255, 255, 255), (232, 232, 232), (150, 150, 150)

Cell = Image.Image | Path | str | None
"""A picture, its file, a word on why there is none, or None where it is simply missing."""


@dataclass(frozen=True)
class Layout:
    """Where everything lies, in pixels.

    ``width = left + columns * pitch`` and ``height = top + rows * cell[1]``; a pitch is a cell's width, or that of the
    widest heading where this is more.

    Attributes:
        cell: (width, height) of a picture.
        pitch: from one column to the next.
        left: width of the row headings.
        top: height of title and column headings.
        rows: of cells.
        columns: of cells.
        letters: height of the letters.
        title: its lines.
    """

    cell: tuple[int, int]
    pitch: int
    left: int
    top: int
    rows: int
    columns: int
    letters: int
    title: tuple[str, ...]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the whole."""
        return self.left + self.columns * self.pitch, self.top + self.rows * self.cell[1]

    def place(self, row: int, column: int) -> tuple[int, int]:
        """Left upper corner of a cell's picture."""
        return self.left + column * self.pitch + (self.pitch - self.cell[0]) // 2, self.top + row * self.cell[1]


def draw_grid(
    cells: Sequence[Sequence[Cell]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Image.Image, tuple[str, ...]]:
    """Draw a grid; one picture at a time is in memory beside it.

    Every cell has the size of the largest picture; a smaller one is enlarged to it, keeping its shape. Where the whole
    would have more than ``max_pixels``, all are scaled down.

    Args:
        cells: by row and column.
        rows: a heading each.
        columns: a heading each.
        title: shown above, over several lines where it is long.
        max_pixels: of the grid.

    Returns:
        the picture (RGB), and what should be told of it.

    Raises:
        RequestError: no cells, rows of another length than the headings, or more cells than go into the pixels.
        InputError: a file cannot be read.
    """
    if not rows or not columns or len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        raise RequestError(
            f"cells of a grid must be {len(rows)} rows of {len(columns)}, got {[len(row) for row in cells]}"
        )
    full = _largest(cells)
    made = layout(full, rows, columns, title, max_pixels)
    grid = Image.new("RGB", made.size, PAPER)
    _letter(ImageDraw.Draw(grid), made, rows, columns)
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            grid.paste(_picture(cell, made), made.place(row, column))
    if made.cell == full:
        return grid, ()
    was, became = (f"{width}x{height}" for width, height in (full, made.cell))
    return grid, (f"cells of the grid are scaled from {was} to {became}, so that it has at most {max_pixels} pixels",)


def layout(
    cell: tuple[int, int], rows: Sequence[str], columns: Sequence[str], title: str, max_pixels: int = MAX_PIXELS
) -> Layout:
    """The layout of a grid whose cells are as large as asked, or as large as ``max_pixels`` allow.

    Raises:
        RequestError: there are more cells than go into the pixels.
    """
    width, height = cell
    scale = 1.0
    while True:
        made = _layout((max(1, int(width * scale)), max(1, int(height * scale))), rows, columns, title)
        pixels = made.size[0] * made.size[1]
        if pixels <= max_pixels:
            return made
        if min(made.cell) <= min(LEAST_CELL_PIXELS, width, height):
            raise RequestError(
                f"a grid must have at most {max_pixels} pixels, got {len(rows)} x {len(columns)} cells",
                hint="compare fewer at a time",
            )
        scale *= min(0.98, (max_pixels / pixels) ** 0.5)


def _layout(cell: tuple[int, int], rows: Sequence[str], columns: Sequence[str], title: str) -> Layout:
    letters = min(40, max(14, cell[0] // 16))
    gap = letters // 2
    pitch = max(cell[0], max(width_of(shown(text), letters) for text in columns) + 2 * gap)
    left = max(width_of(shown(text), letters) for text in rows) + 2 * gap
    lines = wrap(shown(title), letters, left + len(columns) * pitch - 2 * gap, TITLE_LINES)
    top = (len(lines) + 1) * line_pixels(letters) + 2 * gap
    return Layout(cell, pitch, left, top, len(rows), len(columns), letters, tuple(lines))


def _letter(draw: ImageDraw.ImageDraw, made: Layout, rows: Sequence[str], columns: Sequence[str]) -> None:
    gap, line, face = made.letters // 2, line_pixels(made.letters), font(made.letters)
    for number, text in enumerate(made.title):
        draw.text((gap, gap + number * line), text, INK, face)
    for column, text in enumerate(columns):
        middle = made.left + column * made.pitch + made.pitch / 2
        draw.text((middle, made.top - gap), shown(text), INK, face, anchor="ms")
    for row, text in enumerate(rows):
        middle = made.top + row * made.cell[1] + made.cell[1] / 2
        draw.text((made.left - gap, middle), shown(text), INK, face, anchor="rm")


def _largest(cells: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    sizes = [_size(cell) for row in cells for cell in row if not isinstance(cell, str | None)]
    return (max(width for width, _ in sizes), max(height for _, height in sizes)) if sizes else (256, 256)


def _size(cell: Image.Image | Path) -> tuple[int, int]:
    return cell.size if isinstance(cell, Image.Image) else load_picture(cell).image.size


def _picture(cell: Cell, made: Layout) -> Image.Image:
    if cell is None or isinstance(cell, str):
        return _missing(cell or "missing", made)
    image = load_picture(cell).image
    if image.size == made.cell:
        return image
    scale = min(made.cell[0] / image.width, made.cell[1] / image.height)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    field = Image.new("RGB", made.cell, GREY)
    corner = (made.cell[0] - size[0]) // 2, (made.cell[1] - size[1]) // 2
    field.paste(image.resize(size, Image.Resampling.LANCZOS), corner)
    return field


def _missing(reason: str, made: Layout) -> Image.Image:
    """A grey field, crossed out, with the reason in it as far as it goes in."""
    width, height = made.cell
    field = Image.new("RGB", made.cell, GREY)
    draw = ImageDraw.Draw(field)
    draw.line((0, 0, width - 1, height - 1), FAINT)
    draw.line((0, height - 1, width - 1, 0), FAINT)
    size = max(10, made.letters * 3 // 4)
    lines = [cut(line, size, width - 4) for line in wrap(shown(reason), size, width - 4, 4)]
    tall = len(lines) * line_pixels(size)
    for number, text in enumerate(lines):
        middle = height / 2 - tall / 2 + (number + 0.5) * line_pixels(size)
        wide = width_of(text, size) / 2 + 2
        draw.rectangle((width / 2 - wide, middle - size * 0.7, width / 2 + wide, middle + size * 0.7), fill=GREY)
        draw.text((width / 2, middle), text, INK, font(size), anchor="mm")
    return field
