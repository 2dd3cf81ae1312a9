"""One picture read once, many pictures made: shares of the picture by rows, strengths by columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .grid import Cell as Shown
from .grid import draw_grid
from .request import GenerateRequest

if TYPE_CHECKING:
    from PIL import Image

    from .qx import JobFile, Prepared
    from .session import Engine

MAX_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """One picture of a sweep.

    Attributes:
        alpha: share of the picture that was read; None where none was.
        strength: of the noise on the picture to start from; None where the run says it, or there is none.
    """

    alpha: float | None
    strength: float | None

    @property
    def stem(self) -> str:
        """``alpha_0.30_strength_0.80``, the name of its file."""
        return "_".join(f"{name}_{number(value)}" for name, value in self.numbers.items()) or "picture"

    @property
    def label(self) -> str:
        """``alpha 0.30, strength 0.80``."""
        return ", ".join(f"{name} {number(value)}" for name, value in self.numbers.items())

    @property
    def numbers(self) -> dict[str, float]:
        """What is told of it, by name."""
        both = {"alpha": self.alpha, "strength": self.strength}
        return {name: value for name, value in both.items() if value is not None}


@dataclass(frozen=True)
class Axes:
    """The shares and strengths of a sweep.

    Attributes:
        alphas: a row each; (None,) without a picture that is read.
        strengths: a column each; (None,) where the run says it, or there is nothing to start from.

    Raises:
        RequestError: a value is not from 0 to 1 or stands twice, or there are too many cells.
    """

    alphas: tuple[float | None, ...] = (None,)
    strengths: tuple[float | None, ...] = (None,)

    def __post_init__(self) -> None:
        for name, values in {"alphas": self.alphas, "strengths": self.strengths}.items():
            known = [value for value in values if value is not None]
            wrong = [value for value in known if not 0 <= value <= 1]
            if wrong:
                raise RequestError(f"{name} must be from 0 to 1, got {wrong[0]:g}")
            if len({number(value) for value in known}) < len(known) or not values:
                raise RequestError(f"{name} must be different, got {', '.join(map(number, known)) or 'none'}")
        if len(self.alphas) * len(self.strengths) > MAX_CELLS:
            raise RequestError(
                f"a sweep must have at most {MAX_CELLS} cells, got {len(self.alphas)} x {len(self.strengths)}"
            )

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Row by row."""
        return tuple(Cell(alpha, strength) for alpha in self.alphas for strength in self.strengths)

    @property
    def headings(self) -> tuple[list[str], list[str]]:
        """Of rows and of columns."""
        rows, columns = [Cell(alpha, None) for alpha in self.alphas], [Cell(None, each) for each in self.strengths]
        return [each.label for each in rows], [each.label for each in columns]

    def grid(self, shown: Mapping[Cell, Shown], title: str) -> tuple[Image.Image, tuple[str, ...]]:
        """The pictures side by side; see :func:`draw_grid`.

        Args:
            shown: a picture, its file or why there is none, by cell.
            title: shown above.
        """
        width = len(self.strengths)
        cells = [shown.get(cell) for cell in self.cells]
        rows = [cells[first : first + width] for first in range(0, len(cells), width)]
        return draw_grid(rows, *self.headings, title)


def number(value: float) -> str:
    """With two digits behind the point, or as many as it has."""
    return f"{value:.2f}" if round(value, 2) == value else repr(float(value))


def encoded(engine: Engine, job: JobFile, fields: Mapping[str, Any]) -> JobFile:
    """The job with the prompt, the negative prompt and the picture to start from encoded, each once for all cells.

    What the job has of this prompt already stays.

    Args:
        engine: the opened model.
        job: pictures that were read, and perhaps encoded parts.
        fields: of the request.

    Raises:
        RequestError: as :meth:`Engine.extract`.
        InputError: a picture cannot be used.
    """
    from .qx.make import encoded as encode

    negative = fields.get("negative_prompt", job.negative_prompt)
    request = {name: value for name, value in fields.items() if name != "statistics"}
    asked = {**request, "prompt": fields.get("prompt", job.prompt), "negative_prompt": negative}
    same = job.prompt == asked["prompt"] and job.negative_prompt == negative
    if same and job.given.prompt_embeds is not None and "init_image" not in fields:
        return job
    made = encode(engine, GenerateRequest(**asked))
    if "init_image" not in fields and job.given.init is not None:
        kept = replace(made.given, init=job.given.init, size=job.given.size)
        made = replace(made, given=kept, pictures=job.pictures)
    own = {"raw": job.raw, "extractor": job.extractor, "knobs": job.knobs, "blend": job.blend, "render": job.render}
    return replace(made, **own)


def prepared(
    engine: Engine, job: JobFile, axes: Axes, fields: Mapping[str, Any], todo: Sequence[Cell]
) -> Iterator[tuple[Cell, Prepared]]:
    """The request of each cell: one blend per row, nothing encoded.

    Args:
        engine: the opened model.
        job: as :func:`encoded` gives it, with the knobs of the blend.
        axes: of the sweep.
        fields: of the request, and ``statistics``.
        todo: cells that are wanted; the order is that of the axes.

    Raises:
        RequestError: as :func:`prepare`.
    """
    from .qx import prepare

    for alpha in axes.alphas:
        wanted = [cell for cell in axes.cells if cell.alpha == alpha and cell in todo]
        if not wanted:
            continue
        made = prepare(job, {**fields, **({} if alpha is None else {"alpha": alpha})}, engine)
        for cell in wanted:
            request = made.request
            if job.given.init is not None and request.given is not None:
                request = replace(request, given=replace(request.given, init=job.given.init, size=job.given.size))
            if cell.strength is not None:
                request = replace(request, strength=cell.strength)
            yield cell, replace(made, request=request)
