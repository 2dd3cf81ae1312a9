"""Which files a checkpoint lies in: one file, an index with its shards, or shards that number themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError
from .document import read_json
from .header import Header

_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors$")


def expand(paths: Sequence[Path]) -> tuple[list[Path], Mapping[str, Path] | None]:
    """The safetensors files behind ``paths``, and which tensor an index promises in which of them.

    Raises:
        CheckpointError: a shard is missing, or the index is bad.
    """
    if not paths:
        raise CheckpointError("a checkpoint must have at least one file, got none")
    if len(paths) > 1:
        return list(paths), None
    path = paths[0]
    if path.name.endswith(".index.json"):
        listed = _read_index(path)
        return sorted(set(listed.values())), listed
    match = _SHARD.match(path.name)
    if match is None:
        return [path], None
    count = int(match["count"])
    files = [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    _require_files(files)
    return files, None


def _read_index(path: Path) -> Mapping[str, Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to files, got {weight_map!r:.80}")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: weight_map must name safetensors files beside it, got {name!r:.200}")
    listed = {tensor: path.with_name(name) for tensor, name in weight_map.items()}
    _require_files(sorted(set(listed.values())))
    return listed


def _require_files(files: Iterable[Path]) -> None:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"all shards must be there, got none of {', '.join(missing[:10])}",
            hint="qengine pull MODEL resumes a download",
        )


def check_index(listed: Mapping[str, Path], headers: Sequence[Header]) -> None:
    """Refuse shards that hold other tensors than their index lists.

    Raises:
        CheckpointError: naming the first ten.
    """
    real = {name: header.path for header in headers for name in header.tensors}
    wrong = [name for name in listed.keys() | real.keys() if listed.get(name) != real.get(name)]
    if wrong:
        place = headers[0].path.parent
        raise CheckpointError(
            f"{place}: the shards must hold what the index lists, got {listing('differences', sorted(wrong))}",
            hint="qengine verify MODEL names altered files",
        )


def listing(kind: str, names: Sequence[str]) -> str:
    """A count, a kind and the first ten names, for messages."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"{len(names)} {kind}: {', '.join(names[:10])}{more}"
