"""Small JSON documents beside the weights: model_index.json and config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_DOCUMENT_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, larger than 64 MiB, or holds no JSON object.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable file, got {error.strerror or error}") from error
    if len(text) > MAX_DOCUMENT_BYTES:
        raise CheckpointError(f"{path} must be at most {MAX_DOCUMENT_BYTES} bytes, got more")
    try:
        document = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be a JSON document, got {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(document).__name__}")
    return document
