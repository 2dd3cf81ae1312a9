"""Words on a terminal: ``qengine`` and its commands. Results go to stdout, everything else to stderr."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after ``qengine``; None takes them from the process.
    """
    from .boundary import run

    return run(argv)
