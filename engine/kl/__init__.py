"""The flux-type image autoencoder (AutoencoderKL), in bands of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import KlVAE

__all__ = ["KlVAE"]


def __getattr__(name: str) -> Any:
    # Lazily, so that a plan can use `config` and `memory` without torch.
    if name == "KlVAE":
        from .model import KlVAE

        return KlVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
