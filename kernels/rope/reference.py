"""The definition in torch: the norm in the dtype of x, the rotation in float32, some tokens at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 15
DEVICE_CHUNK_ELEMENTS = 8 << 20


def norm_rope_joint(
    x: torch.Tensor, weight: torch.Tensor, rotations: torch.Tensor, out: torch.Tensor, eps: float
) -> torch.Tensor:
    """See ``kernels.rope.norm_rope_joint``."""
    batch, tokens, heads, width = x.shape
    elements = CHUNK_ELEMENTS if x.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // (batch * heads * width))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        normed = F.rms_norm(x[:, part], (width,), weight, eps).float()
        pairs = torch.view_as_complex(normed.reshape(*normed.shape[:-1], -1, 2)).mul_(rotations[part, None])
        out[:, part] = torch.view_as_real(pairs).flatten(3)
    return out
