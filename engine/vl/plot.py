"""A picture of an extraction: its spread by dimension against the reference, outliers, and what the blend does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..chart import GREY, INK, Array, Canvas, Scale, around, axes
from ..letters import cut, width_of, wrap
from ..metadata import write_picture
from .figures import Figures, Spread, report_figures
from .knobs import Knobs
from .raw import RawExtraction
from .stats import MAKE, Statistics

WIDTH, HEIGHT = 1600, 1000
LEFT, RIGHT, SIDE = 92, 1190, 1218
UPPER, LOWER = (112, 500), (590, 940)
NUMBERED = 16
BINS = 48
LINE, HIGH, LOW = (20, 20, 20), (200, 30, 40), (20, 120, 60)
POINTS = (70, 120, 190)
SERIES = {"before": (120, 120, 120), "after": (50, 100, 190), "blended": (225, 120, 20)}
PALE = {"before": (212, 212, 212), "after": (190, 208, 238), "blended": (248, 214, 176)}


def draw_report(
    raw: RawExtraction,
    knobs: Knobs | None,
    statistics: Statistics | str | Path | None,
    path: str | Path,
    blended: torch.Tensor | None = None,
    text_embeds: torch.Tensor | None = None,
) -> Figures:
    """Measure an extraction and write the picture of it, whole or not at all.

    Args:
        raw: hidden states of the layers that the knobs name.
        knobs: the settings; None takes the defaults.
        statistics: as in :func:`report_figures`.
        path: .png, .jpg or .webp.
        blended: [T', D], what the transformer gets.
        text_embeds: [T, D] of the prompt.

    Returns:
        the numbers that it shows.

    Raises:
        RequestError: as :func:`report_figures`.
        InputError: the statistics cannot be read.
        OutputError: the picture cannot be written.
    """
    figures = report_figures(raw, knobs, statistics, blended, text_embeds)
    write_picture(path, draw_figures(figures), None)
    return figures


def draw_figures(figures: Figures) -> Image.Image:
    """The picture of a report: RGB, 1600 x 1000."""
    canvas = Canvas(WIDTH, HEIGHT)
    canvas.text(LEFT, 22, "Picture conditioning: spread of every dimension", 26)
    canvas.text(LEFT, 58, _settings(figures), 15, GREY)
    x = Scale(0.85, max(10, len(figures.order)) * 1.15, LEFT, RIGHT)
    _against_reference(canvas, figures, x)
    _before_and_after(canvas, figures, x)
    bottom = _outlier_list(canvas, figures, _numbers(canvas, figures))
    _notes(canvas, figures, bottom)
    return canvas.finished()


def _settings(figures: Figures) -> str:
    result = figures.result
    layer = result.hidden_layer
    layers = ", ".join(f"{k} x {w:g}" for k, w in layer.items()) if isinstance(layer, Mapping) else str(layer)
    words = [f"Qwen3-VL {result.model_variant}", f"layer {layers}", f"tokens: {result.token_selection}"]
    words.append(f"normalisation: {result.normalization_mode}" if result.scale_factor != 1 else "not normalised")
    words.append(f"outlier masking: {result.outlier_masking}")
    return "  |  ".join(words)


def _against_reference(canvas: Canvas, figures: Figures, x: Scale) -> None:
    reference, measured, order = figures.reference, figures.measured, figures.order
    curves = [each.std for each in (reference, measured) if each is not None and each.std is not None]
    y = Scale(*around(curves), UPPER[1], UPPER[0])
    sorted_by = reference.name if reference is not None and reference.std is not None else measured.name
    axes(canvas, x, y, (f"dimension, by rank of its std in {sorted_by} (1 is the largest)", "std"))
    places = x.at(np.arange(1, len(order) + 1, dtype=np.float64))
    entries = []
    if measured.std is not None:
        canvas.dots(places, y.at(measured.std[order]), POINTS)
        entries.append((POINTS, f"{measured.name} of the picture, before all ({measured.rows} rows)"))
    if reference is not None and reference.std is not None:
        entries.append((LINE, _reference_words(reference)))
        entries += _reference_lines(canvas, figures, places, y, reference.std[order])
    _mark(canvas, figures, places, y)
    _legend(canvas, entries, UPPER[0] - 14)


def _reference_words(reference: Spread) -> str:
    return f"{reference.name} ({reference.rows} rows)" if reference.rows else reference.name


def _reference_lines(
    canvas: Canvas, figures: Figures, places: Array, y: Scale, std: Array
) -> list[tuple[tuple[int, int, int], str]]:
    """The reference, and the two lines beyond which a dimension is an outlier; returns their legend."""
    entries = []
    canvas.line(list(zip(places.tolist(), y.at(std).tolist(), strict=True)), LINE, 2)
    for factor, colour, side in ((figures.threshold, HIGH, "above"), (1 / figures.threshold, LOW, "below")):
        inside = (std * factor > y.low) & (std * factor < y.high)
        points = list(zip(places[inside].tolist(), y.at(std[inside] * factor).tolist(), strict=True))
        canvas.dashes(_even(points), colour)
        if points:
            entries.append((colour, f"{figures.threshold:g}x {side}"))
    return entries


def _even(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a line at short, equal steps to the right, so that dashes come out alike."""
    if len(points) < 2:
        return points
    xs, ys = (np.array(each) for each in zip(*points, strict=True))
    along = np.arange(xs[0], xs[-1], 2.0)
    return list(zip(along.tolist(), np.interp(along, xs, ys).tolist(), strict=True))


def _mark(canvas: Canvas, figures: Figures, places: Array, y: Scale) -> None:
    """A ring around each outlier; the first ones carry their number in the list."""
    if figures.measured.std is None:
        return
    rank = np.empty_like(figures.order)
    rank[figures.order] = np.arange(len(rank))
    std = figures.measured.std
    for number, each in reversed(list(enumerate(figures.outliers, 1))):
        x, height = float(places[rank[each.dimension]]), float(y.at(std[each.dimension : each.dimension + 1])[0])
        canvas.ring(x, height, _colour(each.direction), 5 if number <= NUMBERED else 3)
    for number, each in enumerate(figures.outliers[:NUMBERED], 1):
        x, height = float(places[rank[each.dimension]]), float(y.at(std[each.dimension : each.dimension + 1])[0])
        canvas.label(x, height, str(number), 15, _colour(each.direction))


def _colour(direction: str) -> tuple[int, int, int]:
    return HIGH if direction == "high" else LOW


def _before_and_after(canvas: Canvas, figures: Figures, x: Scale) -> None:
    """A cloud of points for each matrix and the running mean through it, in the order of the upper picture."""
    order = figures.order
    known = [(each, each.std[order]) for each in figures.series if each.std is not None]
    y = Scale(*around([std for _, std in known]), LOWER[1], LOWER[0])
    axes(canvas, x, y, ("dimension, in the same order", "std"))
    places = x.at(np.arange(1, len(order) + 1, dtype=np.float64))
    for each, std in known:
        canvas.dots(places, y.at(std), PALE[each.name], 1)
    for thickness, (each, std) in zip((5, 3, 2), known, strict=False):
        canvas.line(_running(places, y.at(std)), SERIES[each.name], thickness)
    entries = [(SERIES[each.name], f"{each.name} ({each.rows} rows)") for each, _ in known]
    _legend(canvas, entries, LOWER[0] - 14)
    alone = [each.name for each in figures.series if each.std is None]
    if alone:
        canvas.text(RIGHT, LOWER[0] - 14, f"one row has no std: {', '.join(alone)}", 15, GREY, "rs")


def _running(xs: Array, ys: Array) -> list[tuple[float, float]]:
    """Mean height (of logarithms: the geometric mean of the values) in equal parts of the axis."""
    part = np.minimum((xs - xs[0]) / max(xs[-1] - xs[0], 1e-9) * BINS, BINS - 1).astype(int)
    return [(float(xs[part == number].mean()), float(ys[part == number].mean())) for number in np.unique(part)]


def _legend(canvas: Canvas, entries: list[tuple[tuple[int, int, int], str]], y: int) -> None:
    x = float(LEFT)
    for colour, words in entries:
        canvas.line([(x, y - 5), (x + 22, y - 5)], colour, 3)
        canvas.text(x + 30, y, words, 15, INK, "ls")
        x += 30 + width_of(words, 15) + 28


def _numbers(canvas: Canvas, figures: Figures) -> int:
    """The numbers beside the pictures; returns where they end."""
    y = UPPER[0]
    canvas.text(SIDE, y, "std over all entries", 18)
    rows = [] if figures.reference is None else [figures.reference]
    for each in (*rows, *figures.series):
        y += 27
        canvas.text(SIDE, y, cut(each.name, 16, 220), 16, SERIES.get(each.name, INK))
        canvas.text(WIDTH - 30, y, f"{each.total:.4g}", 16, INK, "ra")
    y += 40
    masked = "none" if figures.masked is None else str(len(figures.masked))
    for name, value in (("factor", f"{figures.result.scale_factor:.4g}"), ("dimensions masked", masked)):
        canvas.text(SIDE, y, name, 16)
        canvas.text(WIDTH - 30, y, value, 16, INK, "ra")
        y += 27
    return y + 14


def _outlier_list(canvas: Canvas, figures: Figures, y: int) -> int:
    """The numbered outliers; returns where they end."""
    canvas.text(SIDE, y, f"outliers, beyond {figures.threshold:g}x", 18)
    y += 30
    if figures.reference is None:
        for line in wrap(f"no reference statistics here, so none can be told; {MAKE}", 15, WIDTH - 30 - SIDE, 4):
            canvas.text(SIDE, y, line, 15, HIGH)
            y += 21
        return y
    if not figures.outliers:
        canvas.text(SIDE, y, "none", 16, GREY)
        y += 25
    for number, each in enumerate(figures.outliers[:NUMBERED], 1):
        colour = _colour(each.direction)
        canvas.text(SIDE + 22, y, f"{number}", 16, colour, "ra")
        canvas.text(SIDE + 34, y, f"dim {each.dimension}", 16)
        canvas.text(WIDTH - 150, y, f"{each.ratio:.4g}x", 16, INK, "ra")
        canvas.text(WIDTH - 135, y, "above" if each.direction == "high" else "below", 16, colour)
        y += 25
    more = len(figures.outliers) - NUMBERED
    if more > 0:
        canvas.text(SIDE + 34, y, f"and {more} more, with smaller rings", 15, GREY)
        y += 25
    return y


def _notes(canvas: Canvas, figures: Figures, y: int) -> None:
    """What was masked and what the user should hear, as far as there is room."""
    lines = []
    if figures.masked:
        lines += wrap("masked: dim " + ", ".join(map(str, figures.masked)), 15, WIDTH - 30 - SIDE, 3)
    for note in figures.result.notes:
        lines += ["", *wrap(note, 15, WIDTH - 30 - SIDE, 5)]
    for line in lines[: max(0, (HEIGHT - 60 - y) // 21)]:
        y += 21
        canvas.text(SIDE, y, line, 15, GREY)
