"""Where files are kept; needs no torch."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """``$QENGINE_CACHE``, else ``$XDG_CACHE_HOME/qengine``, else ``~/.cache/qengine``."""
    chosen = os.environ.get("QENGINE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qengine"
