"""Z-Image: a single-stream transformer, its schedule, its guidance and its text encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encoder import ZImageEncoder
    from .model import Context, ZImageTransformer

__all__ = ["Context", "ZImageEncoder", "ZImageTransformer"]


def __getattr__(name: str) -> Any:
    # Lazily, so that a plan can use `config` without torch.
    if name == "ZImageEncoder":
        from .encoder import ZImageEncoder

        return ZImageEncoder
    if name in ("Context", "ZImageTransformer"):
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
