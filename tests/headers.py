"""A diffusers folder of Qwen-Image-Edit-2511 in its true shapes whose weights are holes: 57.7 GB that take no room."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from qengine.bench.true_shapes import TEXT_ENCODER, TRANSFORMER, VAE
from qengine.loaders import shapes

BF16_BYTES = 2
SHARD_BYTES = 10 * 10**9

INDEX = {
    "_class_name": "QwenImageEditPlusPipeline",
    "_diffusers_version": "0.36.0",
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def write_true_shape_checkpoint(folder: Path) -> Path:
    """Write the folder: true names, shapes, dtypes and sharding; the data is a hole in each file.

    Args:
        folder: where to write; made when missing.
    """
    text = shapes.text_encoder_shapes(TEXT_ENCODER) | {"lm_head.weight": (152064, 3584)}
    _write_json(folder / "model_index.json", INDEX)
    _write_part(folder / "transformer", TRANSFORMER, shapes.transformer_shapes(TRANSFORMER), "diffusion_pytorch_model")
    _write_part(folder / "text_encoder", TEXT_ENCODER, text, "model")
    _write_part(folder / "vae", VAE, shapes.vae_shapes(VAE), "diffusion_pytorch_model")
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    _write_json(folder / "tokenizer" / "vocab.json", {"a": 0})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    _write_json(folder / "processor" / "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056})
    return folder


def write_hollow(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """A safetensors file with a whole header and a hole for data; returns the bytes of the data."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, shape in tensors.items():
        nbytes = prod(shape) * BF16_BYTES
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    return offset


def _write_part(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], stem: str) -> None:
    _write_json(folder / "config.json", config)
    shards = _split(tensors)
    if len(shards) == 1:
        write_hollow(folder / f"{stem}.safetensors", tensors)
        return
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(write_hollow(folder / name, shard) for name, shard in zip(names, shards, strict=True))
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    _write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _split(tensors: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in tensors.items():
        nbytes = prod(shape) * BF16_BYTES
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
