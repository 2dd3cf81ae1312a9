"""Weight formats: what a block's slab holds for the tensors of a checkpoint; needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import RequestError
from .layout import Specs

FORMATS = ("bf16", "int8", "fp8")
QUANTISED = {"int8": "I8", "fp8": "F8_E4M3"}
"""Formats with one byte per weight and a float32 scale per row, and their safetensors dtype."""

MAX_GROUP = 256

DEAD_IN_LAST_BLOCK = frozenset(
    {
        "attn.add_q_proj.weight",
        "attn.add_q_proj.bias",
        "attn.norm_added_q.weight",
        "attn.to_add_out.weight",
        "attn.to_add_out.bias",
        "txt_mlp.net.0.proj.weight",
        "txt_mlp.net.0.proj.bias",
        "txt_mlp.net.2.weight",
        "txt_mlp.net.2.bias",
    }
)
"""Parameters of the last transformer block that only feed the text output, which nothing reads."""


def rotation_group(columns: int) -> int:
    """Size of the groups that are rotated together: the largest power of 4 up to 256 that divides the columns."""
    group = MAX_GROUP
    while columns % group:
        group //= 4
    return group


def check_format(name: str) -> str:
    """The name, if it is a weight format.

    Raises:
        RequestError: it is not.
    """
    if name not in FORMATS:
        raise RequestError(f"weight format must be one of {', '.join(FORMATS)}, got {name!r}")
    return name


def slab_specs(
    shapes: Mapping[str, tuple[int, ...]], weight_format: str, plain: str, keep: Collection[str] = ()
) -> Specs:
    """Specs of a block in a weight format.

    A matrix ``x.weight`` becomes ``x.weight`` [rows, columns] of one byte each and ``x.scale`` [rows] in float32, where
    stored x scale = value; every other tensor stays in the plain dtype.

    Args:
        shapes: name inside the block to shape, in execution order.
        weight_format: ``bf16`` (everything plain), ``int8`` or ``fp8``.
        plain: safetensors name of the compute dtype, ``BF16`` or ``F32``.
        keep: matrices that stay plain.
    """
    specs: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, shape in shapes.items():
        if weight_format in QUANTISED and len(shape) == 2 and name.endswith(".weight") and name not in keep:
            specs[name] = (shape, QUANTISED[weight_format])
            specs[name.removesuffix("weight") + "scale"] = ((shape[0],), "F32")
        else:
            specs[name] = (shape, plain)
    return specs
