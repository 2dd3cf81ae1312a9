"""Tensor names as they are stored by different tools, brought to one spelling; and the formats that are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from ..errors import CheckpointError
from .header import TensorInfo

ZERO_COND_MARKER = "__index_timestep_zero__"

_PICKLED = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".npz", ".npy"})
_DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_ZIMAGE_HEADS = (("final_layer.", "all_final_layer.2-1."), ("x_embedder.", "all_x_embedder.2-1."))
_ZIMAGE_INNER = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
_ENCODER_ROOTS = (
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "language_model."),
    ("model.visual.", "visual."),
    ("model.layers.", "language_model.layers."),
    ("model.embed_tokens.", "language_model.embed_tokens."),
    ("model.norm.", "language_model.norm."),
    ("layers.", "language_model.layers."),
    ("embed_tokens.", "language_model.embed_tokens."),
    ("norm.", "language_model.norm."),
)
_FLOATS = frozenset({"BF16", "F16", "F32"})
_RAW_KINDS = MappingProxyType(
    {
        "F8_E4M3": "raw fp8 (float8_e4m3fn without scales)",
        "F8_E5M2": "raw fp8 (float8_e5m2 without scales)",
        "F8_E8M0": "mxfp8",
        "I8": "int8",
        "U8": "packed 4-bit or 8-bit",
        "F64": "float64",
    }
)
_QUANTISED_TAILS = (
    (".comfy_quant", "comfy_quant (per-layer quantisation of ComfyUI)"),
    (".scale_weight", "scaled_fp8 (legacy scaled fp8 of ComfyUI)"),
    (".weight_scale_inv", "block-scaled fp8"),
    (".qweight", "nunchaku or AWQ 4-bit"),
    (".wscales", "nunchaku 4-bit"),
    (".weight_scale", "scaled 8-bit or 4-bit"),
    (".scale_input", "scaled_fp8 (legacy scaled fp8 of ComfyUI)"),
)


def check_file_kind(path: Path) -> None:
    """Refuse files that are not safetensors, naming what they are.

    Raises:
        CheckpointError: pickled files (never opened), GGUF, or another suffix.
    """
    suffix = path.suffix.lower()
    if suffix in _PICKLED:
        raise CheckpointError(
            f"{path} must be a safetensors file, got a pickled {suffix} file, which can run code when it is opened",
            hint="convert it on a machine you can lose, with safetensors.torch.save_file of its state dict",
        )
    if suffix == ".gguf" or _magic(path) == b"GGUF":
        raise CheckpointError(
            f"{path} must be a safetensors file, got GGUF, which this version does not read",
            hint="use the bf16 safetensors file of the same model",
        )
    if suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
        raise CheckpointError(f"{path} must be a .safetensors file, got {suffix or 'no suffix'}")


def _magic(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} must be a readable file, got {error.strerror or error}") from error


def transformer_renamer(stored: Iterable[str]) -> Callable[[str], str | None]:
    """The renaming for a transformer file: the prefix of all-in-one files goes, and so do their other parts.

    The marker ``__index_timestep_zero__`` is dropped (it is found in ``Checkpoint.dropped``).
    """
    names = tuple(stored)
    prefix = next((p for p in _DIT_PREFIXES if any(name.startswith(p) for name in names)), "")

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        short = name.removeprefix(prefix)
        return None if short == ZERO_COND_MARKER else short

    return rename


def zimage_renamer(stored: Iterable[str]) -> Callable[[str], str | None]:
    """The renaming for a Z-Image transformer file to diffusers names.

    Single files name the ends without the patch (``x_embedder``, ``final_layer``) and spell the attention otherwise;
    their ``attention.qkv.weight`` keeps its name and is split afterwards. ``norm_final.weight`` is used by no code and
    dropped.
    """
    shorten = transformer_renamer(stored)

    def rename(name: str) -> str | None:
        short = shorten(name)
        if short is None or short == "norm_final.weight":
            return None
        for head, ours in _ZIMAGE_HEADS:
            if short.startswith(head):
                short = ours + short.removeprefix(head)
        for inner, ours in _ZIMAGE_INNER:
            short = short.replace(inner, ours)
        return short

    return rename


def text_encoder_name(name: str) -> str:
    """A Qwen2.5-VL name in the one spelling: ``language_model.*``, ``visual.*``, ``lm_head.weight``.

    Accepts the names of the hub files of 2025 and of transformers 5 ``save_pretrained`` (``model.layers``, ``visual``),
    those in memory of transformers 5 (``model.language_model``, ``model.visual``), and the bare language model.
    """
    for root, ours in _ENCODER_ROOTS:
        if name.startswith(root):
            return ours + name.removeprefix(root)
    return name


def check_unquantised(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], place: str, subject: str) -> None:
    """Refuse quantised weights, naming their format.

    Raises:
        CheckpointError: the tensors are not all bf16, fp16 or fp32.
    """
    kind = _quantised_kind(tensors, metadata)
    if kind:
        raise CheckpointError(
            f"{place}: weights of the {subject} must be bf16, fp16 or fp32, "
            f"got {kind}, which this version does not read",
            hint="use the bf16 safetensors file of the same model",
        )


def _quantised_kind(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    if "scaled_fp8" in tensors:
        return "scaled_fp8 (legacy scaled fp8 of ComfyUI)"
    if "_quantization_metadata" in metadata:
        return "comfy_quant (quantisation listed in the file's metadata)"
    for tail, kind in _QUANTISED_TAILS:
        if any(name.endswith(tail) for name in tensors):
            return kind
    strange = sorted({info.dtype for info in tensors.values()} - _FLOATS)
    return _RAW_KINDS.get(strange[0], strange[0].lower()) if strange else None
