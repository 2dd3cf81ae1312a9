"""Which family a model is of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..loaders.variant import ZIMAGE

if TYPE_CHECKING:
    from ..loaders import ModelSource
    from .family import Family


def family_of(source: ModelSource) -> Family:
    """How a model's parts are opened and run."""
    if source.variant in ZIMAGE:
        from .zimage.family import ZImageFamily

        return ZImageFamily()
    from .dit.family import QwenImageFamily

    return QwenImageFamily()
