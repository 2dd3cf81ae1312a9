"""``qengine doctor``: what this installation runs on, and what is missing."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ..version import __version__
from .machine import Card, cards, engine_cache, free_memory_bytes, hub_cache, version_of
from .models import free_disk_bytes, tiny_folder
from .words import bytes_text, table

REQUIRED = ("torch", "safetensors", "transformers", "numpy", "pillow", "huggingface_hub", "click", "rich")
OPTIONAL = ("diffusers", "triton", "optimum-quanto", "nvidia-ml-py")
LEAST_DISK_BYTES = 5 << 30

Row = tuple[str, str, str]
"""(state, subject, words); the state is ok, note or bad."""


def show(values: Mapping[str, Any]) -> int:
    """Print every finding; 1 when something required is missing."""
    rows = list(findings())
    if values["json"]:
        print(json.dumps([dict(zip(("state", "subject", "words"), row, strict=True)) for row in rows], indent=2))
    else:
        print(table([*rows]))
    return 1 if any(state == "bad" for state, _, _ in rows) else 0


def findings() -> Iterator[Row]:
    """What was found, one row each."""
    yield "ok", "qengine", __version__
    yield "ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield from _packages()
    yield from _devices()
    yield _native()
    yield _tiny()
    free = free_memory_bytes()
    yield ("note", "RAM", "not reported") if free is None else ("ok", "RAM", f"{bytes_text(free)} free")
    for subject, folder in (("models", hub_cache()), ("cache", engine_cache())):
        room = free_disk_bytes(folder)
        yield "ok" if room >= LEAST_DISK_BYTES else "note", subject, f"{folder}, {bytes_text(room)} free"


def _packages() -> Iterator[Row]:
    for name in (*REQUIRED, *OPTIONAL):
        version = version_of(name)
        if version is not None:
            yield "ok", name, version
        else:
            yield "bad" if name in REQUIRED else "note", name, "not installed"


def _devices() -> Iterator[Row]:
    found = cards()
    for number, card in enumerate(found):
        yield "ok", f"card {number}", f"{card.name}, {_room(card)} free"
    try:
        import torch
    except (ImportError, OSError) as error:
        yield "bad", "torch device", f"torch cannot be imported: {error}"
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield "ok", "torch device", f"cuda {torch.version.cuda}: {', '.join(names)}"
    elif found:
        yield "note", "torch device", f"cpu: torch {torch.__version__} does not see the card; a CUDA build would"
    else:
        yield "ok", "torch device", f"cpu, {torch.get_num_threads()} threads"


def _room(card: Card) -> str:
    return f"{bytes_text(card.free_bytes)} of {bytes_text(card.total_bytes)}"


def _native() -> Row:
    from ..kernels import native

    status = native.status()
    if status.library is not None:
        return "ok", "native", f"{status.path}, ABI {native.ABI_VERSION}, computes with {native.isa()}"
    return "note", "native", f"not used: {status.reason}; the Python twins are"


def _tiny() -> Row:
    folder = tiny_folder()
    if folder is None:
        return "bad", "tiny model", "missing from this installation"
    return "ok", "tiny model", str(folder)


def first_screen() -> str:
    """What ``qengine`` alone prints: version, devices, memory, models, and the one next command."""
    from ..loaders import hub

    rows: list[tuple[str, ...]] = [("qengine", __version__)]
    found = cards()
    for card in found:
        rows.append(("device", f"{card.name}, {_room(card)} VRAM free"))
    if not found:
        rows.append(("device", f"CPU ({platform.machine() or sys.platform}); no NVIDIA card found"))
    free = free_memory_bytes()
    if free is not None:
        rows.append(("RAM", f"{bytes_text(free)} free"))
    tiny = tiny_folder()
    models = [model.hub_id + ("" if model.complete else " (incomplete)") for model in hub.list_models()]
    present = [*(["tiny (inside qengine)"] if tiny else []), *models]
    rows.append(("models", ", ".join(present) or "none"))
    if tiny is not None:
        rows.append(("next", 'qengine edit PHOTO "make it grayscale" -o out.png'))
    else:
        rows.append(("next", "qengine pull qwen-image-edit-2511"))
    return table(rows)
