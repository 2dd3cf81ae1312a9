"""Says how many bytes of weights have been read while a phase loads, or packed when it first needs them packed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from .progress import Display, Talk
from .words import bytes_text, seconds_text

INTERVAL_SECONDS = 0.5
LINE_SECONDS = 2.0
WORTH_SAYING_BYTES = 64 << 20


class PackMeter:
    """Shows weights being packed: a phase of its own, after which the one that needed them goes on.

    Args:
        talk: where it is shown; a log gets a line every two seconds.

    Attributes:
        phase: the phase that goes on afterwards, or None if packing is all there is.
        active: weights are being packed.
    """

    def __init__(self, talk: Talk) -> None:
        self.phase: str | None = None
        self.active = False
        self._talk = talk
        self._start = self._said = 0.0

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes are packed."""
        now = time.perf_counter()
        if not self.active:
            self.active, self._start, self._said = True, now, now
            self._talk.display.start("pack", total)
        if done >= total:
            self.active = False
            self._talk.display.end(f"{bytes_text(total)}  {seconds_text(now - self._start)}")
            if self.phase is not None:
                self._talk.display.start(self.phase)
        elif self._talk.live or now - self._said >= LINE_SECONDS:
            self._said = now
            self._talk.display.amount(done, f"{bytes_text(done)} of {bytes_text(total)}")


class ReadMeter:
    """Watches a byte counter from a thread of its own, since loading happens inside the engine's phases.

    Args:
        display: where the words go.
        counter: bytes read so far.
        packing: reading is not worth a word while it is active.
    """

    def __init__(self, display: Display, counter: Callable[[], int], packing: PackMeter | None = None) -> None:
        self._display = display
        self._counter = counter
        self._packing = packing
        self._said = counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qengine-read-meter", daemon=True)

    def look(self) -> None:
        """Say the counter if it grew enough to be worth a word."""
        now = self._counter()
        if self._packing is not None and self._packing.active:
            return
        if now - self._said >= WORTH_SAYING_BYTES:
            self._said = now
            self._display.reading(f"{bytes_text(now)} read")

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self.look()

    def __enter__(self) -> ReadMeter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
