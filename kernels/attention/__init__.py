"""Attention without a mask, by the name of what computes it; torch and the libraries are imported on first use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import KernelError
from .libraries import LIBRARIES

if TYPE_CHECKING:
    import torch

__all__ = ["ALIASES", "LIBRARIES", "MODES", "attend", "attend_weighted"]

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


def attend_weighted(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    runs: Sequence[tuple[int, float | torch.Tensor]],
    *,
    mode: str = "sdpa",
) -> torch.Tensor:
    """``softmax(query keys^T / sqrt(hd) + gain) values`` per head, ``gain`` of each key told for runs of keys.

    No matrix of gains is made: every run is attention of its own, and parts ``o_1``, ``o_2`` with logs of sums ``l_1``,
    ``l_2`` (gains in them) join to ``o_1 + (o_2 - o_1) sigmoid(l_2 - l_1)`` in float32 or better. Runs of one gain, all
    told, are :func:`attend`, to the bit.

    Args:
        query: [B, T, H, hd], float32, float64, bfloat16 or float16.
        keys: [B, S, H, hd], dtype and device of query.
        values: [B, S, H, hd], the same.
        runs: (count, gain) from the first key to the last, gain a float, or floats [count] for one per key.
        mode: as of :func:`attend`. ``xformers`` gives no sums; a gain per key is for ``sdpa``, ``sdpa-efficient`` and
            ``math``, and rounded to the dtype of query.

    Returns:
        [B, T, H * hd] in the dtype of query.

    Raises:
        KernelError: as :func:`attend`; runs that do not add up to the keys; a mode that cannot weigh.
    """
    _check(query, keys, values)
    mode = ALIASES.get(mode, mode)
    if mode not in MODES:
        raise KernelError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    counts = [count for count, _ in runs]
    if sum(counts) != keys.shape[1] or min(counts, default=0) < 0:
        raise KernelError(f"runs must add up to {keys.shape[1]} keys, got {counts}")
    plain = [(count, float(gain) if isinstance(gain, int | float) else gain) for count, gain in runs]
    for count, gain in plain:
        if not isinstance(gain, int | float) and (gain.shape != (count,) or gain.device != query.device):
            raise KernelError(f"gain must be [{count}] on {query.device}, got {list(gain.shape)} on {gain.device}")
    from .weighted import attend as by_parts
    from .weighted import joined

    parts = joined(plain)
    if len(parts) == 1 and isinstance(parts[0][1], float):
        return attend(query, keys, values, mode=mode)
    return by_parts(query, keys, values, parts, mode)


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
