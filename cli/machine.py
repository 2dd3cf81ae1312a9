"""What this machine has, asked without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Card:
    """An NVIDIA card as its driver reports it."""

    name: str
    total_bytes: int
    free_bytes: int


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cards() -> list[Card]:
    """NVIDIA cards, by NVML; empty where there is no driver or no nvidia-ml-py."""
    try:
        pynvml = import_module("pynvml")
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_card(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _card(pynvml: Any, index: int) -> Card:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name = pynvml.nvmlDeviceGetName(handle)
    return Card(name.decode() if isinstance(name, bytes) else name, int(memory.total), int(memory.free))


def free_memory_bytes() -> int | None:
    """RAM that a program could still get, or None where the system does not say."""
    from ..engine.measure import host_memory

    found = host_memory()
    return None if found is None else found[1]


def hub_cache() -> Path:
    """The hub's cache folder, by the same variables and order as huggingface_hub."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "huggingface" / "hub"


def engine_cache() -> Path:
    """The folder of cached conditioning, modulation rows and packed files."""
    from ..engine.places import default_cache

    return default_cache()
