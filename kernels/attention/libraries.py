"""Attention by libraries that are no dependency of this package; torch-free until one is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from ...errors import KernelError

if TYPE_CHECKING:
    import torch

HALF_BYTES = 2


@dataclass(frozen=True)
class Library:
    """Where the function of a mode is found, and what it is called with.

    Attributes:
        module: that holds it.
        function: its name.
        arguments: by name, beside query, keys and values [B, T, H, hd] and the scale.
        scale: name of its argument for ``1 / sqrt(hd)``.
        install: how to get it.
        half: it takes 16-bit numbers alone.
        sums: the argument with which it also returns the logs of its sums [B, H, T]; empty where it has none.
    """

    module: str
    function: str
    arguments: dict[str, Any]
    scale: str
    install: str
    half: bool = True
    sums: str = ""


LIBRARIES = {
    "flash": Library(
        "flash_attn",
        "flash_attn_func",
        {"dropout_p": 0.0, "causal": False},
        "softmax_scale",
        "pip install flash-attn --no-build-isolation",
        sums="return_attn_probs",
    ),
    "xformers": Library(
        "xformers.ops",
        "memory_efficient_attention",
        {"attn_bias": None, "p": 0.0},
        "scale",
        "pip install xformers",
        half=False,
    ),
    # The kernel that this library picks by itself on capability 8.6 sums P V in float16, which overflows in Qwen-Image.
    "sage": Library(
        "sageattention",
        "sageattn_qk_int8_pv_fp16_cuda",
        {"tensor_layout": "NHD", "is_causal": False, "pv_accum_dtype": "fp32"},
        "sm_scale",
        "pip install git+https://github.com/thu-ml/SageAttention (version 2, built from source)",
        sums="return_lse",
    ),
}
"""Source: Dao-AILab/flash-attention, facebookresearch/xformers, thu-ml/SageAttention@d1a57a5:sageattention/core.py."""


def found(mode: str) -> str:
    """Why a library cannot be used, as far as can be told without importing it; empty where it may.

    Returns:
        Words with the way to install it, or "".
    """
    library = LIBRARIES[mode]
    package = library.module.partition(".")[0]
    try:
        there = find_spec(package) is not None
    except ValueError:  # a module without a spec is loaded already
        there = True
    return "" if there else f"{package} is not installed: {library.install}"


def importable(mode: str) -> str:
    """As :func:`found`, by importing it: also a build for another torch or CUDA, or a version without the function."""
    library = LIBRARIES[mode]
    missing = found(mode)
    if missing:
        return missing
    try:
        module = import_module(library.module)
    except (ImportError, OSError) as error:
        return f"{library.module} cannot be imported ({' '.join(str(error).split())}): {library.install}"
    there = hasattr(module, library.function)
    return "" if there else f"{library.module} has no {library.function}: {library.install}"


def function_of(mode: str) -> Callable[..., torch.Tensor]:
    """The function of a mode, to be called with query, keys, values and its scale.

    Raises:
        KernelError: the library cannot be used; the message says how to install it.
    """
    reason = importable(mode)
    if reason:
        raise KernelError(f"attention must be by a library that is here, got {mode!r}: {reason}")
    library = LIBRARIES[mode]
    return partial(getattr(import_module(library.module), library.function), **library.arguments)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``kernels.attention.attend``."""
    return _checked(mode, query)(query, keys, values, **{LIBRARIES[mode].scale: query.shape[-1] ** -0.5}).flatten(2)


def attend_with_sums(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, T, H, hd] and the log of the sum of exponentials per query [B, T, H].

    Raises:
        KernelError: the library returns no sums, or there is a bias, which none takes.
    """
    library = LIBRARIES[mode]
    if not library.sums or bias is not None:
        missing = "gains per key" if library.sums else "gains"
        raise KernelError(f"attention must be sdpa where references have {missing}, got {mode!r}")
    arguments = {library.scale: query.shape[-1] ** -0.5, library.sums: True}
    found = cast(Any, _checked(mode, query)(query, keys, values, **arguments))
    return found[0], found[1].transpose(1, 2)


def _checked(mode: str, query: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function of a mode, if it takes a query of this dtype."""
    if LIBRARIES[mode].half and query.element_size() != HALF_BYTES:
        raise KernelError(f"query must be bfloat16 or float16 for {mode}, got {query.dtype}")
    return function_of(mode)
