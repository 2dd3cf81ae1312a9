"""One component of a model (transformer, VAE, text encoder): its files, its config, and whether the two agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import detect, shapes
from .checkpoint import Checkpoint
from .dequantised import DequantisedCheckpoint
from .document import read_json
from .header import read_header
from .names import check_file_kind, check_unquantised, text_encoder_name, transformer_renamer
from .quanto import detect_quanto

_RESUME = "qengine pull MODEL resumes a download"


@dataclass(frozen=True)
class Component:
    """One part of a model.

    Attributes:
        name: "transformer", "vae" or "text_encoder".
        config: as in its config.json, or detected from the headers.
        checkpoint: its tensors.
    """

    name: str
    config: Mapping[str, Any]
    checkpoint: Checkpoint


def open_transformer(place: Path) -> Component:
    """The Qwen-Image transformer in a folder or a single file.

    Raises:
        CheckpointError: missing, incomplete, quantised by anything but quanto, or of another kind than its config says.
    """
    files = component_files(place, "transformer")
    rename = transformer_renamer(stored_names(files))
    checkpoint = open_checkpoint(files, rename, "transformer")
    config = stored_config(place, "_class_name", "QwenImageTransformer2DModel")
    config = detect.transformer_config(checkpoint) if config is None else config
    detect.check_transformer(config, checkpoint)
    if config.get("use_additional_t_cond") or config.get("use_layer3d_rope"):
        raise CheckpointError(f"{place} must be a Qwen-Image or Qwen-Image-Edit transformer, got Qwen-Image-Layered")
    checkpoint.require(shapes.transformer_shapes(config), "Qwen-Image transformer")
    return Component("transformer", config, checkpoint)


def open_vae(place: Path) -> Component:
    """The Qwen image VAE in a folder or a single file; raises CheckpointError as ``open_transformer``."""
    checkpoint = open_checkpoint(component_files(place, "vae"), None, "vae")
    config = stored_config(place, "_class_name", "AutoencoderKLQwenImage")
    config = detect.vae_config(checkpoint) if config is None else config
    detect.check_vae(config, checkpoint)
    checkpoint.require(shapes.vae_shapes(config), "Qwen image VAE")
    return Component("vae", config, checkpoint)


def open_text_encoder(place: Path) -> Component:
    """Qwen2.5-VL in a folder or a single file; raises CheckpointError as ``open_transformer``."""
    checkpoint = open_checkpoint(component_files(place, "text_encoder"), text_encoder_name, "text encoder")
    config = stored_config(place, "model_type", "qwen2_5_vl")
    config = detect.text_encoder_config(checkpoint) if config is None else config
    detect.check_text_encoder(config, checkpoint)
    checkpoint.require(shapes.text_encoder_shapes(config), "Qwen2.5-VL text encoder", ignore=("lm_head.weight",))
    return Component("text_encoder", config, checkpoint)


def check_widths(transformer: Component, vae: Component, text_encoder: Component) -> None:
    """Refuse components that do not belong together.

    Raises:
        CheckpointError: the text width or the latent channels differ.
    """
    width = shapes.text_config(text_encoder.config)["hidden_size"]
    joint = transformer.config["joint_attention_dim"]
    if width != joint:
        raise CheckpointError(f"the text encoder's width must be {joint}, as the transformer expects, got {width}")
    patch = transformer.config.get("patch_size", 2)
    channels = vae.config["z_dim"] * patch * patch
    if channels != transformer.config["in_channels"]:
        raise CheckpointError(
            f"the VAE's latent channels x {patch * patch} must be {transformer.config['in_channels']}, "
            f"as the transformer expects, got {channels}"
        )


def storage_notes(part: Component) -> tuple[str, ...]:
    """What the user should hear of how a component is stored."""
    if not isinstance(part.checkpoint, DequantisedCheckpoint):
        return ()
    return (f"{part.name} is stored in optimum-quanto's {part.checkpoint.weight_format}; values are rows x scale",)


def component_files(place: Path, name: str) -> list[Path]:
    """The weight file, or the index of the shards, of a component's folder or of a file given singly.

    Raises:
        CheckpointError: there is none, more than one, or it is not safetensors.
    """
    if not place.is_dir():
        if not place.exists():
            raise CheckpointError(
                f"{name} must be an existing file or folder, got {place}: there is none", hint=_RESUME
            )
        check_file_kind(place)
        return [place]
    indices = sorted(place.glob("*.safetensors.index.json"))
    files = sorted(place.glob("*.safetensors"))
    for choice in (indices, files):
        plain = [file for file in choice if len(file.name.split(".")) == 2 + (choice is indices) * 2]
        if len(plain or choice) == 1:
            return plain or choice
    if files or indices:
        found = ", ".join(file.name for file in (indices or files)[:10])
        raise CheckpointError(f"{place} must hold one safetensors file or one index of shards, got {found}")
    others = sorted(
        file for file in place.iterdir() if file.is_file() and file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf")
    )
    if others:
        check_file_kind(others[0])
    raise CheckpointError(f"{place} must hold a safetensors file, got none", hint=_RESUME)


def open_checkpoint(files: list[Path], rename: Callable[[str], str | None] | None, subject: str) -> Checkpoint:
    """The tensors of files under our names, quanto's dequantised.

    Args:
        files: a single file, or the shards' index.
        rename: stored name to ours, None for a tensor that is dropped; None keeps all names.
        subject: what it is, for the message.

    Raises:
        CheckpointError: a file is damaged, or quantised in a way that is not read.
    """
    checkpoint = Checkpoint.open(files, rename)
    if detect_quanto(checkpoint) is not None:
        checkpoint = DequantisedCheckpoint(checkpoint)
    check_unquantised(checkpoint.tensors, checkpoint.metadata, checkpoint.place, subject)
    return checkpoint


def stored_names(files: list[Path]) -> list[str]:
    """Names as stored, for the choice of a renaming; an index names them without opening the shards."""
    if files[0].name.endswith(".index.json"):
        return list(read_json(files[0]).get("weight_map") or ())
    return list(read_header(files[0]).tensors)


def stored_config(place: Path, key: str, kind: str) -> dict[str, Any] | None:
    """The config.json of a folder, or the one beside a single file when it is of this kind; None without one."""
    file = (place if place.is_dir() else place.parent) / "config.json"
    if not file.is_file():
        if place.is_dir():
            raise CheckpointError(f"{place} must hold a config.json, got none", hint=_RESUME)
        return None
    config = read_json(file)
    found = config.get(key)
    if found == kind:
        return config
    if place.is_dir():
        raise CheckpointError(f"{file}: {key} must be {kind}, got {found!r:.80}")
    return None
