"""The parts of Z-Image: their files, their configs, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..component import Component, component_files, open_checkpoint, stored_config, stored_names
from ..dequantised import DequantisedCheckpoint
from ..header import TensorInfo
from ..names import text_encoder_name, zimage_renamer
from . import detect, shapes

SCHEDULER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": False,
    }
)
"""The schedule published with Z-Image-Turbo."""

_FUSED = ".attention.qkv.weight"
_ONLY_HERE = ("cap_embedder.0.weight", "noise_refiner.0.attention_norm1.weight")


def is_zimage(place: Path) -> bool:
    """Whether a transformer's file or folder holds Z-Image, by the names in its header or index.

    Raises:
        CheckpointError: it is missing, or no safetensors file.
    """
    names = stored_names(component_files(place, "transformer"))
    return all(any(name.endswith(only) for name in names) for only in _ONLY_HERE)


def open_transformer(place: Path) -> Component:
    """The Z-Image transformer in a folder or a single file.

    Raises:
        CheckpointError: missing, incomplete, quantised by anything but quanto, or of another kind than its config says.
    """
    files = component_files(place, "transformer")
    checkpoint = split_fused(open_checkpoint(files, zimage_renamer(stored_names(files)), "transformer"))
    config = stored_config(place, "_class_name", "ZImageTransformer2DModel")
    config = detect.transformer_config(checkpoint) if config is None else config
    if config.get("siglip_feat_dim") is not None:
        raise CheckpointError(f"{place} must be a Z-Image or Z-Image-Turbo transformer, got Z-Image-Omni")
    detect.check_transformer(config, checkpoint)
    checkpoint.require(shapes.transformer_shapes(config), "Z-Image transformer")
    return Component("transformer", config, checkpoint)


def open_vae(place: Path) -> Component:
    """The flux-type VAE in a folder or a single file; raises CheckpointError as ``open_transformer``."""
    checkpoint = open_checkpoint(component_files(place, "vae"), None, "vae")
    config = stored_config(place, "_class_name", "AutoencoderKL")
    config = detect.vae_config(checkpoint) if config is None else config
    detect.check_vae(config, checkpoint)
    checkpoint.require(shapes.vae_shapes(config), "flux-type VAE")
    return Component("vae", config, checkpoint)


def open_text_encoder(place: Path) -> Component:
    """Qwen3 in a folder or a single file; raises CheckpointError as ``open_transformer``."""
    checkpoint = open_checkpoint(component_files(place, "text_encoder"), text_encoder_name, "text encoder")
    config = stored_config(place, "model_type", "qwen3")
    config = detect.text_encoder_config(checkpoint) if config is None else config
    detect.check_text_encoder(config, checkpoint)
    checkpoint.require(shapes.text_encoder_shapes(config), "Qwen3 text encoder", ignore=("lm_head.weight",))
    return Component("text_encoder", config, checkpoint)


def check_widths(transformer: Component, vae: Component, text_encoder: Component) -> None:
    """Refuse components that do not belong together.

    Raises:
        CheckpointError: the text width or the latent channels differ.
    """
    width, expected = text_encoder.config["hidden_size"], transformer.config["cap_feat_dim"]
    if width != expected:
        raise CheckpointError(f"the text encoder's width must be {expected}, as the transformer expects, got {width}")
    channels, expected = vae.config["latent_channels"], transformer.config["in_channels"]
    if channels != expected:
        raise CheckpointError(
            f"the VAE's latent channels must be {expected}, as the transformer expects, got {channels}"
        )


def split_fused(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors with every ``attention.qkv.weight`` [3 dim, dim] as its three parts, each where it lies.

    Raises:
        CheckpointError: such a tensor is quantised or has another shape.
    """
    if not any(name.endswith(_FUSED) for name in checkpoint.tensors):
        return checkpoint
    if isinstance(checkpoint, DequantisedCheckpoint):
        raise CheckpointError(
            f"{checkpoint.place}: quantised attention must be stored as to_q, to_k and to_v, got qkv",
            hint="use the bf16 safetensors file of the same model",
        )
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if not name.endswith(_FUSED):
            tensors[name] = info
            continue
        if len(info.shape) != 2 or info.shape[0] % 3:
            raise CheckpointError(
                f"{checkpoint.place}: {name} must have a multiple of 3 rows, got shape {list(info.shape)}"
            )
        part, shape = info.nbytes // 3, (info.shape[0] // 3, info.shape[1])
        for place, letter in enumerate("qkv"):
            ours = f"{name.removesuffix('qkv.weight')}to_{letter}.weight"
            tensors[ours] = TensorInfo(ours, info.dtype, shape, info.path, info.offset + place * part, part)
    return Checkpoint(tensors, checkpoint.metadata, checkpoint.paths, checkpoint.dropped)
