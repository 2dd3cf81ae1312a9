"""One line of data on standard output (the package has no `print` outside `cli/`)."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Writes a line and flushes, so that a long run can be watched."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
