"""``torch.nn.functional.scaled_dot_product_attention`` with a kernel that is named, in this call alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import KernelError

OLDEST_FLASH = (8, 0)

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
