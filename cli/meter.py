"""Says how many bytes of weights have been read while a phase loads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from .progress import Display
from .words import bytes_text

INTERVAL_SECONDS = 0.5
WORTH_SAYING_BYTES = 64 << 20


class ReadMeter:
    """Watches a byte counter from a thread of its own, since loading happens inside the engine's phases.

    Args:
        display: where the words go.
        counter: bytes read so far.
    """

    def __init__(self, display: Display, counter: Callable[[], int]) -> None:
        self._display = display
        self._counter = counter
        self._said = counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qengine-read-meter", daemon=True)

    def look(self) -> None:
        """Say the counter if it grew enough to be worth a word."""
        now = self._counter()
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
