"""The standard hub cache on disk: ``models--owner--name/{blobs,refs,snapshots}``. No network, no hub library.

Environment variables are read at each call: HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from .document import read_json

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
READER_TYPE = "qwen3_vl"
_WEIGHTED = ("transformer", "vae", "text_encoder")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def cache_folder() -> Path:
    """The folder of the hub cache; it may not exist yet."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def looks_like_hub_id(name: str) -> bool:
    """True for ``owner/name`` with the characters that the hub allows."""
    return bool(_HUB_ID.match(name)) and ".." not in name and "--" not in name


def repository_folder(hub_id: str) -> Path:
    """Where the cache keeps a repository.

    Raises:
        CheckpointError: it is no hub id.
    """
    if not looks_like_hub_id(hub_id):
        raise CheckpointError(f"hub id must be owner/name, got {hub_id!r}")
    return cache_folder() / ("models--" + hub_id.replace("/", "--"))


def cached_snapshot(hub_id: str) -> Path | None:
    """The snapshot that ``main`` names, or None where nothing was pulled completely."""
    folder = repository_folder(hub_id)
    try:
        commit = (folder / "refs" / "main").read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.match(commit) and snapshot.is_dir() else None


def cached_repositories() -> Iterator[tuple[str, Path]]:
    """Hub id and folder of every model repository in the cache, by name."""
    for folder in sorted(cache_folder().glob("models--*--*")):
        owner, _, name = folder.name.removeprefix("models--").partition("--")
        if folder.is_dir() and looks_like_hub_id(f"{owner}/{name}"):
            yield f"{owner}/{name}", folder


def is_reader(snapshot: Path) -> bool:
    """Whether a folder is laid out as transformers lays out Qwen3-VL, whole or not."""
    config = snapshot / "config.json"
    plain = config.is_file() and not (snapshot / "model_index.json").exists()
    return plain and read_json(config).get("model_type") == READER_TYPE


def missing_parts(snapshot: Path) -> list[str]:
    """What a model's folder lacks, as relative names; empty where nothing does. Only names are looked at."""
    if is_reader(snapshot):
        processors = (snapshot / name for name in ("preprocessor_config.json", "processor_config.json"))
        needed = [] if any(path.is_file() for path in processors) else ["preprocessor_config.json"]
        if not (snapshot / "tokenizer.json").is_file():
            needed += ["vocab.json", "merges.txt"]
        return [name for name in needed if not (snapshot / name).is_file()] + _missing_weights(snapshot)
    missing = [name for name in ("model_index.json", "tokenizer") if not (snapshot / name).exists()]
    for part in _WEIGHTED:
        folder = snapshot / part
        missing += [f"{part}/{name}" for name in _missing_weights(folder)]
        if not (folder / "config.json").is_file():
            missing.append(f"{part}/config.json")
    return missing


def _missing_weights(folder: Path) -> list[str]:
    indices = list(folder.glob("*.safetensors.index.json"))
    if indices:
        listed = read_json(indices[0]).get("weight_map")
        shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
        return [name for name in shards if not (folder / name).is_file()]
    return [] if any(file.is_file() for file in folder.glob("*.safetensors")) else ["*.safetensors"]
