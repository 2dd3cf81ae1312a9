"""A grid of pictures: where every cell lies, to the pixel, and what stands where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qengine.engine.grid import GREY, PAPER, draw_grid, layout
from qengine.engine.letters import cut, shown, width_of, wrap
from qengine.errors import InputError, RequestError

ROWS, COLUMNS = ("alpha 0", "alpha 0.3"), ("strength 0.7", "strength 0.8", "strength 0.9")


def noise(width: int = 160, height: int = 96, seed: int = 0) -> Image.Image:
    values = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def cells(width: int = 160, height: int = 96) -> list[list[Image.Image]]:
    return [[noise(width, height, 3 * row + column) for column in range(3)] for row in range(2)]


def pixels(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.crop(box))


def test_S21_the_grid_is_columns_by_rows_of_cells_and_holds_each_to_the_bit() -> None:
    made = cells()
    grid, notes = draw_grid(made, ROWS, COLUMNS, "a red bicycle, seed 42")
    plan = layout((160, 96), ROWS, COLUMNS, "a red bicycle, seed 42")
    assert grid.size == plan.size == (plan.left + 3 * 160, plan.top + 2 * 96) and notes == ()
    for row in range(2):
        for column in range(3):
            x, y = plan.left + column * 160, plan.top + row * 96
            assert plan.place(row, column) == (x, y)
            assert np.array_equal(pixels(grid, (x, y, x + 160, y + 96)), np.asarray(made[row][column]))


def test_S21_every_row_and_column_has_its_heading_and_the_grid_its_title() -> None:
    grid, _ = draw_grid(cells(), ROWS, COLUMNS, "title")
    bare, _ = draw_grid(cells(), ROWS, ("", "", ""), "title")
    plan = layout((160, 96), ROWS, COLUMNS, "title")
    assert bare.size == grid.size
    for column in range(3):
        x = plan.left + column * plan.pitch
        over = pixels(grid, (x, plan.letters * 2, x + plan.pitch, plan.top))
        assert (over < 128).any() and not (pixels(bare, (x, plan.letters * 2, x + plan.pitch, plan.top)) < 128).any()
    for row in range(2):
        assert (pixels(grid, (0, plan.top + row * 96, plan.left, plan.top + row * 96 + 96)) < 128).any()
    assert (pixels(grid, (0, 0, plan.left, plan.letters * 2)) < 128).any()


@pytest.mark.parametrize("side", [8, 16, 33])
def test_headings_stay_apart_where_cells_are_narrow(side: int) -> None:
    plan = layout((side, side), ROWS, COLUMNS, "t")
    assert plan.letters >= 14 and all(width_of(text, plan.letters) < plan.pitch for text in COLUMNS)
    grid, _ = draw_grid(cells(side, side), ROWS, COLUMNS, "t")
    x, y = plan.place(0, 1)
    assert np.array_equal(pixels(grid, (x, y, x + side, y + side)), np.asarray(cells(side, side)[0][1]))
    assert grid.getpixel((x - 1, y)) == PAPER


def test_a_missing_cell_is_drawn_as_such_with_its_reason() -> None:
    made: list[list[Image.Image | str | None]] = [[noise(), None, "memory ran out after every retry"]]
    grid, _ = draw_grid(made, ("r",), ("a", "b", "c"))
    plan = layout((160, 96), ("r",), ("a", "b", "c"), "")
    for column in (1, 2):
        x, y = plan.place(0, column)
        field = pixels(grid, (x, y, x + 160, y + 96))
        assert tuple(field[10, 80]) == GREY and (field < 60).any()
    only, _ = draw_grid([[None]], ("r",), ("c",))
    assert only.width > 256


def test_pictures_of_another_size_keep_their_shape() -> None:
    white = Image.new("RGB", (20, 40), "white")
    grid, _ = draw_grid([[noise(160, 96), white]], ("r",), ("a", "b"))
    x, y = layout((160, 96), ("r",), ("a", "b"), "").place(0, 1)
    assert np.asarray(grid)[y : y + 96, x + 56 : x + 104].min() > 200
    assert grid.getpixel((x + 2, y + 48)) == GREY


def test_a_grid_stays_below_its_pixels_and_says_so(tmp_path: Path) -> None:
    noise(640, 480).save(tmp_path / "large.png")
    grid, notes = draw_grid([[tmp_path / "large.png"] * 3] * 2, ROWS, COLUMNS, "t", max_pixels=300_000)
    assert 200_000 < grid.width * grid.height <= 300_000
    assert len(notes) == 1 and "scaled from 640x480 to" in notes[0]
    with pytest.raises(RequestError, match="at most 1000 pixels"):
        draw_grid([[tmp_path / "large.png"] * 3] * 2, ROWS, COLUMNS, max_pixels=1000)


def test_bad_cells_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="2 rows of 3"):
        draw_grid([[None] * 3], ROWS, COLUMNS)
    with pytest.raises(RequestError, match="0 rows"):
        draw_grid([], (), COLUMNS)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"cut\.png"):
        draw_grid([[tmp_path / "cut.png"]], ("r",), ("c",))


def test_words_are_cut_wrapped_and_spelt_in_letters_that_the_font_has() -> None:
    assert shown("Zürich  →\ncafé") == "Zurich ? cafe"
    text = "a long title that does not go into one line of the picture"
    assert width_of(cut(text, 14, 100), 14) <= 100 and cut(text, 14, 100).endswith("...")
    assert cut(text, 14, 10_000) == text and cut("w", 40, 3) == ""
    lines = wrap(text, 14, 120, 3)
    assert len(lines) == 3 and all(width_of(line, 14) <= 120 for line in lines) and lines[-1].endswith("...")
    assert " ".join(wrap(text, 14, 120, 9)) == text and wrap("", 14, 100, 2) == []
