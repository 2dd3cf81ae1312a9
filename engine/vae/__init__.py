"""The image VAE of Qwen-Image, in two dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import ImageVAE

__all__ = ["ImageVAE"]


def __getattr__(name: str) -> Any:
    # Lazily, so that a plan can use `cut`, `config` and `memory` without torch.
    if name == "ImageVAE":
        from .model import ImageVAE

        return ImageVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
