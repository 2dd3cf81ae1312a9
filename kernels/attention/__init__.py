"""Attention without a mask, by the name of what computes it; torch and the libraries are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import KernelError
from .libraries import LIBRARIES

if TYPE_CHECKING:
    import torch

__all__ = ["ALIASES", "LIBRARIES", "MODES", "attend"]

SDPA = ("sdpa", "sdpa-flash", "sdpa-efficient")
MODES = (*SDPA, "math", *LIBRARIES)
ALIASES = {"torch": "sdpa", "sageattn": "sage"}

_DIMENSIONS = 4


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, mode: str = "sdpa") -> torch.Tensor:
    """``softmax(query keys^T / sqrt(hd)) values`` per head, every token seeing every other.

    - ``sdpa``: torch's; on CUDA with a kernel that follows from dtype and card alone, never from torch's own choice:
      flash for bfloat16 and float16 from capability 8.0 on, else memory-efficient. On a CPU torch has one.
    - ``sdpa-flash``, ``sdpa-efficient``: torch's, with that kernel.
    - ``math``: the definition in float32, see ``reference``; for steps that came out not finite.
    - ``flash``, ``xformers``, ``sage``: those libraries, see ``libraries``; sums of ``sage`` are in float32.

    Args:
        query: [B, T, H, hd], float32, bfloat16 or float16.
        keys: [B, S, H, hd], dtype and device of query.
        values: [B, S, H, hd], the same.
        mode: one of ``MODES``, or of the other names in ``ALIASES``.

    Returns:
        [B, T, H * hd] in the dtype of query.

    Raises:
        KernelError: no such mode, shapes or dtypes that are not those above, a library that is not there, or a kernel
            of torch that does not take these tensors.
    """
    _check(query, keys, values)
    mode = ALIASES.get(mode, mode)
    if mode in SDPA:
        from .sdpa import attend as by_torch

        return by_torch(query, keys, values, mode)
    if mode in LIBRARIES:
        from .libraries import attend as by_library

        return by_library(query, keys, values, mode)
    if mode != "math":
        raise KernelError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    from .reference import attend as by_definition

    return by_definition(query, keys, values)[0]


def _check(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    batch, heads, width = (query.shape[0], *query.shape[2:]) if query.dim() == _DIMENSIONS else (0, 0, 0)
    if not query.numel() or query.dim() != _DIMENSIONS or not query.is_floating_point():
        raise KernelError(f"query must be floats [B, T, H, hd], not empty, got {query.dtype} {list(query.shape)}")
    if keys.shape != (batch, keys.shape[1] if keys.dim() > 1 else 0, heads, width) or not keys.numel():
        raise KernelError(f"keys must be [{batch}, S, {heads}, {width}], not empty, got {list(keys.shape)}")
    if values.shape != keys.shape:
        raise KernelError(f"values must be {list(keys.shape)} as the keys are, got {list(values.shape)}")
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise KernelError(
                f"{name} must be {query.dtype} on {query.device} as the query is, got {tensor.dtype} on {tensor.device}"
            )
