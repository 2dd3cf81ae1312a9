"""Models in their true shapes whose weights are holes, so that tens of GB take no room."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from qengine.bench.true_shapes import TEXT_ENCODER, TRANSFORMER, VAE, VL, Z_TEXT_ENCODER, Z_TRANSFORMER, Z_VAE
from qengine.loaders import shapes
from qengine.loaders.vl import vl_shapes
from qengine.loaders.zimage import shapes as z_shapes

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

Z_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
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
    _write_tokenizer(folder / "tokenizer")
    _write_json(folder / "processor" / "preprocessor_config.json", {"min_pixels": 3136, "max_pixels": 12845056})
    return folder


def write_true_shape_zimage(folder: Path) -> Path:
    """The same of Z-Image-Turbo: 20.5 GB that take no room.

    Args:
        folder: where to write; made when missing.
    """
    _write_json(folder / "model_index.json", Z_INDEX)
    parts = {
        "transformer": (Z_TRANSFORMER, z_shapes.transformer_shapes(Z_TRANSFORMER), "diffusion_pytorch_model"),
        "text_encoder": (Z_TEXT_ENCODER, z_shapes.text_encoder_shapes(Z_TEXT_ENCODER), "model"),
        "vae": (Z_VAE, z_shapes.vae_shapes(Z_VAE), "diffusion_pytorch_model"),
    }
    for name, (config, tensors, stem) in parts.items():
        _write_part(folder / name, config, tensors, stem)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _write_tokenizer(folder / "tokenizer")
    return folder


def write_true_shape_vl(folder: Path) -> Path:
    """The same of Qwen3-VL-4B: 8.9 GB that take no room.

    Args:
        folder: where to write; made when missing.
    """
    _write_part(folder, VL, vl_shapes(VL), "model")
    _write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{% endfor %}", "utf-8")
    limits = {"shortest_edge": 65536, "longest_edge": 16777216}
    _write_json(folder / "preprocessor_config.json", {"patch_size": 16, "size": limits})
    return folder


def _write_tokenizer(folder: Path) -> None:
    _write_json(folder / "vocab.json", {"a": 0})
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")


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
