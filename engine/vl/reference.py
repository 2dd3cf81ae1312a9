"""Reference statistics made from a text encoder and some prompts, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ...errors import CheckpointError, OutputError, RequestError
from ...loaders.processing import find_tokenizer
from ...loaders.variant import ZIMAGE
from ...loaders.zimage import open_text_encoder
from ..places import default_cache
from ..stack import Hold
from ..whole import write_whole
from ..zimage.encoder import HIDDEN_LAYER, ZImageEncoder
from .stats import FORMAT, Statistics, compute_statistics, write_statistics

if TYPE_CHECKING:
    from ...loaders.component import Component

SUFFIXES = (".safetensors", ".npz", ".json")
AT_ONCE = 16
"""Prompts that go through a layer together."""

PROMPTS = (
    "a red bicycle leaning against a white wall",
    "portrait of an old fisherman with a grey beard, soft window light",
    "a snow-covered village at night, lanterns glowing in every window",
    "two cats asleep on a green velvet sofa",
    "a bowl of ramen with egg and spring onions, seen from above",
    "flat vector illustration of a lighthouse on a cliff",
    "an astronaut riding a horse through a field of sunflowers",
    "black and white photograph of a crowded railway station in the rain",
    "watercolour of a sailing boat in a calm harbour at dawn",
    "a neon sign that reads OPEN above a narrow alley",
    "close-up of a dew drop on a blade of grass",
    "a robot watering plants on a balcony, anime style",
)
"""Taken where no prompts are given: subjects, styles and lengths of many kinds."""


@dataclass(frozen=True)
class TextSource:
    """What a text encoder alone is opened from.

    Attributes:
        text_encoder: its config and tensors.
        tokenizer_dir: its tokenizer.
        notes: decisions worth saying to the user.
    """

    text_encoder: Component
    tokenizer_dir: Path
    notes: tuple[str, ...] = ()


def reference_statistics(
    encode: Callable[[Sequence[str]], Sequence[torch.Tensor]],
    prompts: Sequence[str],
    *,
    layer: int,
    model: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Mean and std (N - 1) of each column over the embeddings of all prompts, laid one below the other.

    Args:
        encode: prompts to embeddings [T, D] each.
        prompts: at least one.
        layer: that the embeddings are of.
        model: fingerprint of the encoder.
        progress: called with prompts done and in all.

    Raises:
        RequestError: no prompts, or as :func:`compute_statistics`.
    """
    if not prompts:
        raise RequestError("prompts of reference statistics must be at least one, got none")
    rows: list[torch.Tensor] = []
    for first in range(0, len(prompts), AT_ONCE):
        part = prompts[first : first + AT_ONCE]
        rows += [embeds.detach().to("cpu", torch.float32) for embeds in encode(part)]
        progress(first + len(part), len(prompts))
    return compute_statistics(rows, layer=layer, model=model, prompts=prompts)


def open_text(place: str | Path, tokenizer: str | Path | None = None) -> TextSource:
    """A Qwen3 text encoder: its folder or file, or a model's folder with ``text_encoder`` in it; headers only.

    Raises:
        CheckpointError: it is missing, incomplete or of another kind, or there is no tokenizer for it.
    """
    folder = Path(place).expanduser()
    if not folder.exists():
        raise CheckpointError(f"text encoder must be a folder or a safetensors file, got {folder}: there is none")
    inner = folder / "text_encoder"
    folder = inner if inner.is_dir() else folder
    found, notes = find_tokenizer(tokenizer, folder)
    return TextSource(open_text_encoder(folder), found, notes)


def open_encoder(
    source: TextSource,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: str = "bf16",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ZImageEncoder:
    """The encoder of Z-Image alone, all its layers on the device; ``encoder.release()`` frees it."""
    hold = Hold(weight_format)
    return ZImageEncoder(cast(Any, source), device, dtype, hold=hold, cache=default_cache(), progress=progress)


def layer_of(variant: str) -> int:
    """The hidden layer that a model's prompt embeddings are: the last but one for Z-Image, else the last."""
    return HIDDEN_LAYER if variant in ZIMAGE else -1


def write_reference(path: str | Path, statistics: Statistics) -> None:
    """Write statistics by the suffix of the file, whole or not at all.

    Raises:
        OutputError: another suffix, or it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise OutputError(f"{path} must end in one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    if suffix == ".safetensors":
        write_statistics(path, statistics)
    elif suffix == ".json":
        write_whole(path, lambda temporary: _write_json(temporary, statistics))
    else:
        write_whole(path, lambda temporary: _write_npz(temporary, statistics))


def _document(statistics: Statistics) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": statistics.model,
        "layer": statistics.layer,
        "ddof": 1,
        "num_prompts": len(statistics.prompts),
        "num_tokens": statistics.num_tokens,
        "hidden_dim": statistics.width,
        "global_mean": statistics.global_mean,
        "global_std": statistics.global_std,
        "prompts": list(statistics.prompts),
        "per_dim_mean": statistics.mean.tolist(),
        "per_dim_std": statistics.std.tolist(),
    }


def _write_json(path: Path, statistics: Statistics) -> None:
    path.write_text(json.dumps(_document(statistics), indent=1) + "\n", "utf-8")


def _write_npz(path: Path, statistics: Statistics) -> None:
    words = {name: value for name, value in _document(statistics).items() if not name.startswith("per_dim")}
    with path.open("wb") as file:
        np.savez(
            file,
            per_dim_mean=statistics.mean.numpy(),
            per_dim_std=statistics.std.numpy(),
            global_mean=np.float64(statistics.global_mean),
            global_std=np.float64(statistics.global_std),
            about=np.array(json.dumps(words)),
        )
