"""One bar over the cells of a sweep, in which the phases of each are words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from .progress import SilentDisplay, Talk


class CellBar:
    """A bar that counts cells; a log gets a line per cell.

    Args:
        talk: where it is shown.
        total: cells to make.

    Attributes:
        talk: for what makes a cell: its notes are told, its phases move this bar.
    """

    def __init__(self, talk: Talk, total: int) -> None:
        self._display, self._live, self._total, self._done = talk.display, talk.live, total, 0
        self._told: set[str] = set()
        self.talk = Talk(quiet=True)
        self.talk.live = talk.live
        self._display.start("sweep", total)

    @contextlib.contextmanager
    def cell(self, label: str) -> Iterator[None]:
        """While a cell is made."""
        self.talk.display = _Phases(self.tell, lambda words: self._show(f"{label}  {words}"))
        self._show(label)
        yield
        self._done += 1
        self._display.step(self._done, label)

    def tell(self, notes: Iterable[str]) -> None:
        """Say each note once, not for every cell again."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                self._display.line(f"note: {note}")

    def end(self) -> None:
        """All cells were tried."""
        self._display.end(f"{self._total} cells")

    def _show(self, words: str) -> None:
        if self._live:
            self._display.step(self._done, words)


class _Phases(SilentDisplay):
    """Hears the phases of one cell.

    Args:
        tell: says notes.
        show: writes words beside the bar.
    """

    def __init__(self, tell: Callable[[Iterable[str]], None], show: Callable[[str], None]) -> None:
        self._tell, self._show, self._phase = tell, show, ""

    def line(self, text: str) -> None:
        """Notes are told; what was done is told by the bar."""
        if text.startswith("note: "):
            self._tell([text.removeprefix("note: ")])

    def start(self, phase: str, total: int | None = None) -> None:
        """Name the phase."""
        self._phase = phase
        self._show(phase)

    def step(self, done: int, text: str) -> None:
        """``denoise 3``: what else is known does not go into a line of 80."""
        self._show(f"{self._phase} {done}")

    def amount(self, done: int, text: str) -> None:
        """``pack 1.2 GiB of 3.4 GiB``."""
        self._show(f"{self._phase} {text}")

    def reading(self, text: str) -> None:
        """``denoise 1.2 GiB read``."""
        self._show(f"{self._phase} {text}")
