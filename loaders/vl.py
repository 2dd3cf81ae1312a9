"""A Qwen3-VL folder in the layout of transformers: weights, config, tokenizer, chat template and image processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .cache import cached_snapshot, looks_like_hub_id
from .checkpoint import Checkpoint
from .component import Component, component_files
from .document import MAX_DOCUMENT_BYTES, read_json
from .names import check_unquantised, text_encoder_name
from .processing import require_tokenizer
from .variant import READERS

MODEL_TYPE = "qwen3_vl"
THINKING_MARK = r"assistant\n<think>"
"""What only the chat template of the Thinking variant holds, with the line break as Jinja writes it."""

PROCESSOR_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "min_pixels": 65536,
    "max_pixels": 16777216,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
"""As published with Qwen3-VL-4B-Instruct; areas in pixels."""

_MAX_LAYERS = 1024
_RESUME = "qengine pull MODEL resumes a download"
_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_VISION_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "in_channels", "patch_size", "spatial_merge_size"),
    *("temporal_patch_size", "out_hidden_size", "num_position_embeddings"),
)

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class VLSource:
    """An opened Qwen3-VL folder; only headers and small documents have been read.

    Attributes:
        folder: where it lies; the tokenizer is here too.
        component: config and tensors, named ``language_model.*`` and ``visual.*``.
        chat_template: the Jinja text.
        variant: ``instruct`` or ``thinking``.
        processor_config: settings of the image processor.
    """

    folder: Path
    component: Component
    chat_template: str
    variant: str
    processor_config: Mapping[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.component.config["text_config"]["hidden_size"]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.component.config["text_config"]["num_hidden_layers"]


def open_vl(place: str | Path) -> VLSource:
    """Open a Qwen3-VL folder, or what the hub's cache holds of a repository.

    Args:
        place: a folder, or a hub id or short name of one that was pulled; the network is not used.

    Raises:
        CheckpointError: something is missing, incomplete, quantised, of another kind, or of other shapes than its
            config says.
    """
    folder = Path(place).expanduser()
    hub_id = READERS.get(str(place).lower(), str(place))
    if not folder.exists() and looks_like_hub_id(hub_id):
        folder = cached_snapshot(hub_id) or folder
    if not folder.is_dir():
        pull = f"qengine pull {place if looks_like_hub_id(hub_id) else 'qwen3-vl-4b'}"
        raise CheckpointError(
            f"Qwen3-VL must be a folder in the layout of transformers, or one that was pulled, got {folder}", hint=pull
        )
    config = _config(folder)
    checkpoint = Checkpoint.open(component_files(folder, "vl"), text_encoder_name)
    check_unquantised(checkpoint.tensors, checkpoint.metadata, checkpoint.place, "Qwen3-VL")
    checkpoint.require(vl_shapes(config), "Qwen3-VL model", ignore=("lm_head.weight",))
    template = chat_template(require_tokenizer(folder))
    component = Component("vl", config, checkpoint)
    return VLSource(folder, component, template, variant_of(template), _processor(folder, config["vision_config"]))


def vocabulary_sha256(folder: Path) -> str | None:
    """SHA-256 over a tokenizer's words and their ids, whatever file holds them; None where none is readable here.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    whole, plain = folder / "tokenizer.json", folder / "vocab.json"
    if whole.is_file():
        model = read_json(whole).get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
    else:
        words = read_json(plain) if plain.is_file() else None
    if not isinstance(words, dict):
        return None
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def variant_of(template: str) -> str:
    r"""``thinking`` where the template holds ``assistant\n<think>`` with an escaped line break, else ``instruct``."""
    return "thinking" if THINKING_MARK in template else "instruct"


def chat_template(folder: Path) -> str:
    """The chat template: of chat_template.jinja, else chat_template.json, else tokenizer_config.json.

    Raises:
        CheckpointError: there is none, or it is no text.
    """
    text = folder / "chat_template.jinja"
    if text.is_file():
        return _read_text(text)
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, str) and found:
            return found
    raise CheckpointError(f"{folder} must hold a chat template, got none", hint=_RESUME)


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_DOCUMENT_BYTES:
            raise CheckpointError(f"{file} must be at most {MAX_DOCUMENT_BYTES} bytes, got more")
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} must be a readable text file, got {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} must hold a config.json, got none", hint=_RESUME)
    config = read_json(file)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{file}: model_type must be {MODEL_TYPE}, got {config.get('model_type')!r:.80}")
    text, vision = (_part(file, config, name) for name in ("text_config", "vision_config"))
    for part, sizes in ((text, _TEXT_SIZES), (vision, _VISION_SIZES)):
        for name in sizes:
            _check_size(file, part, name)
    _check_deepstack(file, text, vision)
    return {**config, "text_config": text, "vision_config": vision}


def _part(file: Path, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    if not isinstance(part, dict):
        raise CheckpointError(f"{file}: {name} must be an object, got {part!r:.80}")
    if name == "vision_config":
        return {"in_channels": part.get("in_chans", 3), **part}
    heads = part.get("num_attention_heads")
    return {"head_dim": 128, "num_key_value_heads": heads, **{k: v for k, v in part.items() if v is not None}}


def _check_size(file: Path, part: Mapping[str, Any], name: str) -> None:
    found = part.get(name)
    most = _MAX_LAYERS if name in ("num_hidden_layers", "depth") else 1 << 31
    if type(found) is not int or not 0 < found <= most:
        raise CheckpointError(f"{file}: {name} must be a whole number from 1 to {most}, got {found!r:.80}")


def _check_deepstack(file: Path, text: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    indexes, depth = vision.get("deepstack_visual_indexes"), vision["depth"]
    if (
        not isinstance(indexes, list)
        or not all(type(index) is int and 0 <= index < depth for index in indexes)
        or sorted(set(indexes)) != indexes
        or len(indexes) > text["num_hidden_layers"]
    ):
        raise CheckpointError(
            f"{file}: deepstack_visual_indexes must be ascending vision layers from 0 to {depth - 1}, at most one per "
            f"decoder layer, got {indexes!r:.80}"
        )
    if vision["out_hidden_size"] != text["hidden_size"]:
        raise CheckpointError(
            f"{file}: out_hidden_size must be {text['hidden_size']} as the language model's width, "
            f"got {vision['out_hidden_size']}"
        )


def _processor(folder: Path, vision: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the image processor, areas spelled ``min_pixels`` and ``max_pixels``."""
    files = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} must hold a preprocessor_config.json, got none", hint=_RESUME)
    given = read_json(file)
    nested = given.get("image_processor")
    given = nested if isinstance(nested, dict) else given
    size = given.get("size")
    size = size if isinstance(size, dict) else {}
    areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    found = {**PROCESSOR_DEFAULTS, **_filled(areas), **_filled(given)}
    found.pop("size", None)
    matches = (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"))
    for ours, theirs in (*matches, ("temporal_patch_size", "temporal_patch_size")):
        if found[ours] != vision[theirs]:
            raise CheckpointError(f"{file}: {ours} must be {vision[theirs]} as in config.json, got {found[ours]!r:.80}")
    return found


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


def vl_shapes(config: Mapping[str, Any]) -> Shapes:
    """Tensors of Qwen3-VL in our spelling; ``lm_head.weight`` is left out, since it is never used."""
    return _language_shapes(config["text_config"]) | _vision_shapes(config["vision_config"])


def _language_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    width, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes: Shapes = {
        "language_model.embed_tokens.weight": (config["vocab_size"], hidden),
        "language_model.norm.weight": (hidden,),
    }
    sizes = {"q_proj": (width, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, width)}
    for layer in range(config["num_hidden_layers"]):
        root = f"language_model.layers.{layer}"
        shapes[f"{root}.input_layernorm.weight"] = shapes[f"{root}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{root}.self_attn.q_norm.weight"] = shapes[f"{root}.self_attn.k_norm.weight"] = (head,)
        for name, size in sizes.items():
            shapes[f"{root}.self_attn.{name}.weight"] = size
            if config.get("attention_bias"):
                shapes[f"{root}.self_attn.{name}.bias"] = size[:1]
        shapes[f"{root}.mlp.gate_proj.weight"] = shapes[f"{root}.mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{root}.mlp.down_proj.weight"] = (hidden, ffn)
    return shapes


def _vision_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, ffn, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    merged = hidden * config["spatial_merge_size"] ** 2
    kernel = (config["in_channels"], config["temporal_patch_size"], patch, patch)
    shapes: Shapes = {
        "visual.patch_embed.proj.weight": (hidden, *kernel),
        "visual.patch_embed.proj.bias": (hidden,),
        "visual.pos_embed.weight": (config["num_position_embeddings"], hidden),
    }
    for layer in range(config["depth"]):
        root = f"visual.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            shapes[f"{root}.{norm}.weight"] = shapes[f"{root}.{norm}.bias"] = (hidden,)
        _linear(shapes, f"{root}.attn.qkv", hidden, 3 * hidden)
        _linear(shapes, f"{root}.attn.proj", hidden, hidden)
        _linear(shapes, f"{root}.mlp.linear_fc1", hidden, ffn)
        _linear(shapes, f"{root}.mlp.linear_fc2", ffn, hidden)
    stacked = [f"visual.deepstack_merger_list.{k}" for k in range(len(config["deepstack_visual_indexes"]))]
    for root in ("visual.merger", *stacked):
        norm = hidden if root == "visual.merger" else merged
        shapes[f"{root}.norm.weight"] = shapes[f"{root}.norm.bias"] = (norm,)
        _linear(shapes, f"{root}.linear_fc1", merged, merged)
        _linear(shapes, f"{root}.linear_fc2", merged, config["out_hidden_size"])
    return shapes


def _linear(shapes: Shapes, name: str, before: int, after: int) -> None:
    shapes[f"{name}.weight"] = (after, before)
    shapes[f"{name}.bias"] = (after,)
