"""What stands around the weights: tokenizer folder, image processor settings, schedule settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from .document import read_json
from .hub import cached_snapshot
from .variant import HUB_IDS, ZIMAGE

# Defaults of Qwen2-VL's image processor as published with Qwen2.5-VL-7B-Instruct.
PROCESSOR_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "rescale_factor": 1 / 255,
        "resample": 3,
    }
)

# The schedule published with every Qwen-Image model.
SCHEDULER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "base_image_seq_len": 256,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
        "time_shift_type": "exponential",
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
    }
)

_PROCESSOR_PLACES = (
    "processor/preprocessor_config.json",
    "processor/processor_config.json",
    "image_processor/preprocessor_config.json",
)
_TOKENIZER_REPOS = (
    *(hub_id for name, hub_id in HUB_IDS.items() if name not in ZIMAGE),
    "Qwen/Qwen2.5-VL-7B-Instruct",
)


def processor_config(folder: Path | None) -> dict[str, Any]:
    """Settings of the image processor: those of the folder over the defaults.

    Old files write ``min_pixels`` and ``max_pixels``, new ones ``size.shortest_edge`` and ``size.longest_edge`` (areas
    all the same); both spellings come back as ``min_pixels`` and ``max_pixels``.

    Raises:
        CheckpointError: the folder's file is no JSON object.
    """
    found = [folder / place for place in _PROCESSOR_PLACES if (folder / place).is_file()] if folder else []
    given = read_json(found[0]) if found else {}
    nested = given.get("image_processor")
    given = nested if isinstance(nested, dict) else given
    size = given.get("size")
    if isinstance(size, dict):
        areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        given = {**{key: value for key, value in areas.items() if value is not None}, **given}
    return {**PROCESSOR_DEFAULTS, **{key: value for key, value in given.items() if value is not None}}


def is_tokenizer(folder: Path) -> bool:
    """True where the folder holds a fast tokenizer, or a vocabulary with its merges."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def require_tokenizer(folder: Path) -> Path:
    """The folder itself.

    Raises:
        CheckpointError: it holds no tokenizer.
    """
    if not is_tokenizer(folder):
        raise CheckpointError(
            f"{folder} must hold tokenizer.json, or vocab.json and merges.txt, got neither",
            hint="qengine pull MODEL resumes a download",
        )
    return folder


def find_tokenizer(given: str | Path | None, text_encoder: Path) -> tuple[Path, tuple[str, ...]]:
    """The tokenizer for single files: the given folder, the one beside the text encoder, or one in the hub's cache.

    Returns:
        the folder, and a note saying where it came from when it was not given.

    Raises:
        CheckpointError: there is none.
    """
    if given is not None:
        folder = Path(given).expanduser()
        inner = folder / "tokenizer"
        return require_tokenizer(inner if is_tokenizer(inner) else folder), ()
    near = text_encoder if text_encoder.is_dir() else text_encoder.parent
    for folder in (near / "tokenizer", near.parent / "tokenizer", near):
        if is_tokenizer(folder):
            return folder, (f"tokenizer taken from {folder}",)
    for repo in _TOKENIZER_REPOS:
        snapshot = cached_snapshot(repo)
        for folder in (snapshot / "tokenizer", snapshot) if snapshot else ():
            if is_tokenizer(folder):
                return folder, (f"tokenizer taken from {repo} in the hub's cache",)
    raise CheckpointError(
        f"single files must come with a tokenizer, got none beside {text_encoder} and none in the hub's cache",
        hint="give its folder with --tokenizer",
    )
