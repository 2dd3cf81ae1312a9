"""``torch.nn.functional.scaled_dot_product_attention`` with a kernel that is named, in this call alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import KernelError

OLDEST_FLASH = (8, 0)
BIAS_ALIGNMENT = 16

_HALF = (torch.bfloat16, torch.float16)
_REFUSALS = ("No available kernel", "No viable backend")
_BACKENDS = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION}


def pinned(mode: str, query: torch.Tensor) -> str:
    """The kernel of a mode for this query: ``sdpa`` on CUDA is flash or memory-efficient by dtype and card."""
    if mode != "sdpa" or not query.is_cuda:
        return mode
    flash = query.dtype in _HALF and torch.cuda.get_device_capability(query.device) >= OLDEST_FLASH
    return "sdpa-flash" if flash else "sdpa-efficient"


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mode: str) -> torch.Tensor:
    """See ``kernels.attention.attend``."""
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    backend = _BACKENDS.get(pinned(mode, query))
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    try:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if not any(words in str(error) for words in _REFUSALS):
            raise
        raise KernelError(
            f"query must be one that {backend.name} takes, got {query.dtype} {list(query.shape)} on {query.device}",
            hint='use mode="math"',
        ) from error
    return out.transpose(1, 2).flatten(2)


def attend_with_sums(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [B, T, H, hd] and the log of the sum of exponentials per query [B, T, H], by torch's own kernels.

    Args:
        query: [B, T, H, hd].
        keys: [B, S, H, hd].
        values: [B, S, H, hd].
        bias: added to the scores of each key, [S], in the dtype of query after rounding; None for none.
        mode: ``sdpa``, ``sdpa-flash`` or ``sdpa-efficient``. On CUDA flash takes no bias: ``sdpa`` then is efficient.

    Raises:
        KernelError: the kernel does not take these tensors.
    """
    kernel = pinned(mode, query)
    if bias is not None and kernel == "sdpa-flash" and mode == "sdpa":
        kernel = "sdpa-efficient"
    if bias is not None and kernel == "sdpa-flash":
        raise KernelError("sdpa-flash must be without gains per key, got some", hint="--attn-mode sdpa")
    q, k, v = (x.transpose(1, 2) for x in (query, keys, values))
    try:
        made, sums = _with_sums(q, k, v, None if bias is None else _spread(bias.to(query.dtype), q, keys), kernel)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        raise KernelError(
            f"query must be one that {kernel} takes, got {query.dtype} {list(query.shape)} on {query.device}: {error}",
            hint='use mode="math"',
        ) from error
    return made.transpose(1, 2), sums[..., : query.shape[1]].transpose(1, 2)


def _with_sums(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    ops = torch.ops.aten
    if not q.is_cuda:
        return ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
    if kernel == "sdpa-flash":
        return ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    return ops._scaled_dot_product_efficient_attention(q, k, v, bias, True)[:2]


def _spread(bias: torch.Tensor, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[S] as [B, H, T, S] of no memory, its start and its rows aligned as the kernels want them."""
    count = keys.shape[1]
    padded = bias.new_zeros(-(-count // BIAS_ALIGNMENT) * BIAS_ALIGNMENT)
    padded[:count] = bias
    return padded[:count].expand(*q.shape[:3], count)
