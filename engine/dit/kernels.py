"""Which implementation each op of a block runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernels:
    """Implementations by op, as ``kernels.dispatch`` names them; linear layers carry their own.

    Attributes:
        modulate: of LayerNorm with modulation and of the gated residual.
        rope: of the norm and rotation of queries and keys.
        attention: mode of ``kernels.attention.attend``.
    """

    modulate: str = "reference"
    rope: str = "reference"
    attention: str = "sdpa"

    @classmethod
    def of(cls, chosen: Mapping[str, str]) -> Kernels:
        """From a plan's choices for the transformer; an op that is not named runs as defined here."""
        return cls(**{op: chosen[op] for op in ("modulate", "rope", "attention") if op in chosen})


DEFINITIONS = Kernels()
"""Every op as torch computes it."""

SAFE = Kernels(attention="math")
"""Every op as it is defined, the sums of attention in float32."""
