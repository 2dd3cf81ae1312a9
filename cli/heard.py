"""What the engine's loggers warn of, said to the user like everything else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from .progress import Talk

ROOT = __name__.partition(".")[0]


class _Teller(logging.Handler):
    def __init__(self, talk: Talk) -> None:
        super().__init__(logging.WARNING)
        self._talk = talk
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it, once."""
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            self._talk.warn(text)


@contextlib.contextmanager
def heard(talk: Talk) -> Iterator[None]:
    """Warnings of the package's loggers become notes for as long as the block runs."""
    logger, teller = logging.getLogger(ROOT), _Teller(talk)
    before = logger.propagate
    logger.addHandler(teller)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(teller)
