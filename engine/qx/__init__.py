"""Job files: what was read and encoded on one machine, for a run on another."""

from __future__ import annotations

from .file import JobFile, read_job, write_job
from .use import Prepared, blended, prepare, request_of

__all__ = ["JobFile", "Prepared", "blended", "prepare", "read_job", "request_of", "write_job"]
