"""Progress on stderr: a live bar on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Protocol, TextIO

from ..engine.measure import resident_bytes
from .words import bytes_text, seconds_text

PHASE_WIDTH = 8


class Display(Protocol):
    """Where progress goes."""

    def line(self, text: str) -> None:
        """Write a whole line."""

    def start(self, phase: str, total: int | None = None) -> None:
        """A phase begins; ``total`` is its number of steps."""

    def step(self, done: int, text: str) -> None:
        """``done`` steps of the phase are done."""

    def amount(self, done: int, text: str) -> None:
        """``done`` bytes of the phase are done; ``text`` says it in words."""

    def reading(self, text: str) -> None:
        """Weights are being read inside the phase; may be called from another thread."""

    def end(self, text: str) -> None:
        """The phase is over; ``text`` says what it took."""

    def close(self) -> None:
        """Give the terminal back."""


class SilentDisplay:
    """Says nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def start(self, phase: str, total: int | None = None) -> None:
        """Nothing."""

    def step(self, done: int, text: str) -> None:
        """Nothing."""

    def amount(self, done: int, text: str) -> None:
        """Nothing."""

    def reading(self, text: str) -> None:
        """Nothing."""

    def end(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainDisplay(SilentDisplay):
    """One line per event, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._phase = ""
        self._total: int | None = None

    def line(self, text: str) -> None:
        """Write a whole line."""
        print(text, file=self._stream, flush=True)

    def start(self, phase: str, total: int | None = None) -> None:
        """Remember the phase; its line is written when there is something to say."""
        self._phase, self._total = phase, total

    def step(self, done: int, text: str) -> None:
        """``denoise  3/8  0.21 s/step``."""
        self.line(f"{self._phase:<{PHASE_WIDTH}} {done}/{self._total}  {text}")

    def amount(self, done: int, text: str) -> None:
        """``pull     1.2 GiB of 40.9 GiB  transformer/...``."""
        self.line(f"{self._phase:<{PHASE_WIDTH}} {text}")

    def reading(self, text: str) -> None:
        """``encode   1.2 GiB read``."""
        self.line(f"{self._phase:<{PHASE_WIDTH}} {text}")

    def end(self, text: str) -> None:
        """``decode   0.31 s``."""
        self.line(f"{self._phase:<{PHASE_WIDTH}} {text}")


class LiveDisplay:
    """A live bar by rich, replaced by one line when its phase ends."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        columns: tuple[Any, ...] = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[words]}", markup=False),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task: Any = None
        self._phase = ""
        self._changing = threading.Lock()

    def line(self, text: str) -> None:
        """Write a whole line above the bar."""
        self._console.print(text)

    def start(self, phase: str, total: int | None = None) -> None:
        """Show the bar of a phase; it pulses while the number of steps is not known."""
        self._drop()
        self._phase = phase
        self._task = self._bar.add_task(f"{phase:<{PHASE_WIDTH}}", total=total, words="")
        self._bar.start()

    def step(self, done: int, text: str) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done, words=text)

    def amount(self, done: int, text: str) -> None:
        """Move the bar."""
        self.step(done, text)

    def reading(self, text: str) -> None:
        """Put the words beside the bar."""
        with self._changing:
            if self._task is not None:
                self._bar.update(self._task, words=text)

    def end(self, text: str) -> None:
        """Replace the bar by a line."""
        self._drop()
        self.line(f"{self._phase:<{PHASE_WIDTH}} {text}")

    def close(self) -> None:
        """Remove the bar and show the cursor again."""
        self._drop()
        self._bar.stop()

    def _drop(self) -> None:
        with self._changing:
            if self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None


def make_display(*, quiet: bool) -> Display:
    """The display that suits where stderr goes."""
    if quiet:
        return SilentDisplay()
    return LiveDisplay(sys.stderr) if sys.stderr.isatty() else PlainDisplay(sys.stderr)


class Talk:
    """Words to the user while a command runs.

    Args:
        quiet: say nothing but errors.
        verbose: also say details.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.display = make_display(quiet=quiet)
        self.live = isinstance(self.display, LiveDisplay)
        self._verbose = verbose

    def say(self, text: str) -> None:
        """What everybody should know."""
        self.display.line(text)

    def detail(self, text: str) -> None:
        """What ``-v`` asks for."""
        if self._verbose:
            self.display.line(text)

    def warn(self, text: str) -> None:
        """Something was decided for the user."""
        self.display.line(f"note: {text}")


class StepClock:
    """Time per step, time left and memory, in words.

    Args:
        device: ``cpu`` or ``cuda``: which memory is shown.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._start = time.perf_counter()

    def words(self, done: int, total: int) -> str:
        """``0.21 s/step  eta 1.05 s  412 MiB``."""
        per_step = (time.perf_counter() - self._start) / max(done, 1)
        parts = [f"{per_step:.2f} s/step", f"eta {seconds_text(per_step * (total - done))}", memory_words(self._device)]
        return "  ".join(part for part in parts if part)

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.perf_counter() - self._start


def memory_words(device: str) -> str:
    """VRAM reserved by this process on CUDA, else its resident memory; "" where the system does not say."""
    if device.startswith("cuda"):
        import torch

        return f"{bytes_text(torch.cuda.memory_reserved(device))} VRAM"
    resident = resident_bytes()
    return "" if resident is None else f"{bytes_text(resident)} RAM"
