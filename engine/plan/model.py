"""A model in numbers, whatever its family: the one place that knows which facts are whose."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...loaders.variant import ZIMAGE
from .facts import EncoderFacts, Part, TransformerFacts, VaeFacts
from .qwen import qwen_encoder, qwen_transformer, qwen_vae
from .zimage import kl_vae, qwen3_encoder, z_transformer

if TYPE_CHECKING:
    from ...loaders.source import ModelSource


@dataclass(frozen=True)
class ModelFacts:
    """A model in numbers; :meth:`of` takes them from headers and configs alone.

    Attributes:
        label: as the user wrote it.
        variant: which model it is.
        transformer: the diffusion transformer.
        encoder: the text encoder.
        vae: the image VAE.
    """

    label: str
    variant: str
    transformer: TransformerFacts
    encoder: EncoderFacts
    vae: VaeFacts

    @classmethod
    def of(cls, source: ModelSource, keep: Collection[str] = ()) -> ModelFacts:
        """Facts of an opened model.

        Args:
            source: the model.
            keep: matrices of a transformer block that stay plain in every weight format.
        """
        kept = frozenset(keep)
        if source.variant in ZIMAGE:
            parts = (
                z_transformer(source.transformer, kept),
                qwen3_encoder(source.text_encoder),
                kl_vae(source.vae),
            )
        else:
            parts = (
                qwen_transformer(source.transformer, kept),
                qwen_encoder(source.text_encoder),
                qwen_vae(source.vae),
            )
        return cls(source.label, source.variant, *parts)

    @cached_property
    def parts(self) -> tuple[Part, Part, Part]:
        """The components as stored."""
        return self.transformer.part, self.encoder.part, self.vae.part

    @property
    def multiple(self) -> int:
        """Pixels per token side."""
        return 2 * self.vae.scale_factor
