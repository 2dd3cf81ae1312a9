"""Job files: what was read and encoded on one machine, for a run on another."""

from __future__ import annotations

from .file import JobFile, read_job, write_job
from .use import blended, request_of

__all__ = ["JobFile", "blended", "read_job", "request_of", "write_job"]
