"""What the text encoder hands to the transformer, and a cache of it, so that a known prompt needs no encoder at all."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, OutputError
from ..loaders.header import read_header
from .files import write_tensors

logger = logging.getLogger(__name__)

FORMAT = "qengine-conditioning-1"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of one request.

    Attributes:
        prompt_embeds: [T, D].
        negative_embeds: [T', D] of the negative prompt; None without one.
        key: content address, 64 hexadecimal digits; see :meth:`PromptEncoder.key`.
    """

    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor | None
    key: str

    def to(self, device: torch.device) -> Conditioning:
        """The same on another device."""
        negative = None if self.negative_embeds is None else self.negative_embeds.to(device)
        return replace(self, prompt_embeds=self.prompt_embeds.to(device), negative_embeds=negative)


class ConditioningCache:
    """Conditioning by content address, a few in memory and, with a folder, on disk.

    Entries live on the CPU. A file that cannot be read, or is not what was written, counts as absent: it is reported
    through `logging` and replaced by the next :meth:`put`. A disk that refuses a write is reported the same way, and
    the run goes on without it.

    Args:
        folder: where the files lie, one per entry; None keeps entries in memory only.
        memory_entries: how many are kept in memory, least recently used first to go.
        max_bytes: bound on the folder's files together, least recently used first to go.
    """

    def __init__(self, folder: Path | None = None, *, memory_entries: int = 8, max_bytes: int = 2 << 30) -> None:
        self._folder = folder
        self._memory_entries = memory_entries
        self._max_bytes = max_bytes
        self._memory: OrderedDict[str, Conditioning] = OrderedDict()

    def get(self, key: str) -> Conditioning | None:
        """The entry, its tensors on the CPU, or None."""
        known = self._memory.get(key)
        if known is None:
            known = self._read(key)
            if known is None:
                return None
        self._remember(known)
        return known

    def put(self, conditioning: Conditioning) -> None:
        """Keep an entry in memory and on disk."""
        entry = conditioning.to(torch.device("cpu"))
        self._remember(entry)
        if self._folder is None:
            return
        try:
            self._write(entry)
            self._shrink()
        except (OSError, OutputError) as error:
            logger.warning("conditioning is not kept on disk: %s", error)

    def _remember(self, entry: Conditioning) -> None:
        self._memory[entry.key] = entry
        self._memory.move_to_end(entry.key)
        while len(self._memory) > self._memory_entries:
            self._memory.popitem(last=False)

    def _path(self, key: str) -> Path | None:
        return self._folder / f"{key}.safetensors" if self._folder is not None and _KEY.fullmatch(key) else None

    def _write(self, entry: Conditioning) -> None:
        path = self._path(entry.key)
        if path is None:
            raise OutputError(f"key of a cached conditioning must be 64 hexadecimal digits, got {entry.key!r}")
        tensors = {"prompt_embeds": entry.prompt_embeds}
        if entry.negative_embeds is not None:
            tensors["negative_embeds"] = entry.negative_embeds
        write_tensors(path, tensors, {"format": FORMAT, "key": entry.key, "sha256": _digest(tensors)})

    def _read(self, key: str) -> Conditioning | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            entry = _load(path, key)
        except (CheckpointError, SafetensorError, OSError) as error:
            logger.warning("cached conditioning is ignored and made again: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    def _shrink(self) -> None:
        """Remove the least recently used files until the rest are within the bound; the newest always stays."""
        if self._folder is None:
            return
        files = [(path, path.stat()) for path in self._folder.glob("*.safetensors") if _KEY.fullmatch(path.stem)]
        files.sort(key=lambda item: item[1].st_mtime_ns, reverse=True)
        held = 0
        for number, (path, state) in enumerate(files):
            held += state.st_size
            if held > self._max_bytes and number > 0:
                path.unlink(missing_ok=True)


def _load(path: Path, key: str) -> Conditioning:
    header = read_header(path)
    names = set(header.tensors)
    if header.metadata.get("format") != FORMAT or header.metadata.get("key") != key:
        raise CheckpointError(f"{path} must be a {FORMAT} file of its name's key, got another")
    if names not in ({"prompt_embeds"}, {"prompt_embeds", "negative_embeds"}):
        raise CheckpointError(f"{path} must hold prompt_embeds and negative_embeds, got {sorted(names)[:10]}")
    if any(len(info.shape) != 2 for info in header.tensors.values()):
        raise CheckpointError(f"{path} must hold matrices, got other shapes")
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name).clone() for name in sorted(names)}
    if _digest(tensors) != header.metadata.get("sha256"):
        raise CheckpointError(f"{path} must hold the data that was written, got altered bytes")
    return Conditioning(tensors["prompt_embeds"], tensors.get("negative_embeds"), key)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
