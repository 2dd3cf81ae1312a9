"""Pictures to hidden states of Qwen3-VL, and on to embeddings that can stand in for a prompt's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ...errors import RequestError
from ...loaders.vl import VLSource, open_vl
from ..encoder.prompt import Counters
from ..places import default_cache
from ..stack import Hold
from ..stack.pack import Progress
from .condition import VLExtractionResult, condition
from .encoder import Picture, VLEncoder
from .knobs import (
    Z_IMAGE_WIDTH,
    Direction,
    Knobs,
    Layers,
    Normalisation,
    OutlierMode,
    ScaleStat,
    Selection,
    select_tokens,
)
from .masking import MaskMode
from .raw import RawExtraction
from .stats import Statistics

if TYPE_CHECKING:
    from ..mover import Tape

logger = logging.getLogger(__name__)


class UnloadedError(RequestError, RuntimeError):
    """An extractor was used after :meth:`VLEmbeddingExtractor.unload`."""


class VLEmbeddingExtractor:
    """Qwen3-VL as an encoder of pictures for Z-Image; the embeddings are made to be blended with a prompt's.

    Args:
        encoder: the opened model; see :meth:`from_pretrained`.

    Attributes:
        encoder: the model.
        notes: what the user should hear of it; also told through `logging`.
    """

    def __init__(self, encoder: VLEncoder) -> None:
        self.encoder = encoder
        self._unloaded = False
        self.notes = _width_notes(encoder.source.hidden_size)
        for note in self.notes:
            logger.warning("%s", note)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        torch_dtype: str | torch.dtype = torch.bfloat16,
        *,
        hold: Hold | None = None,
        weight_format: str | None = None,
        cache: Path | None = None,
        alone: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> VLEmbeddingExtractor:
        """Open a Qwen3-VL folder.

        Args:
            path: the folder, in the layout of transformers.
            device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
            torch_dtype: float32 or bfloat16.
            hold: format and place of the decoder layers.
            weight_format: ``bf16``, ``int8`` or ``fp8``, short for a hold of this format on the device.
            cache: folder of packed files; None takes the usual one where the format needs it.
            alone: the vision tower is freed before the decoder layers are read.
            progress: called while the layers are packed.

        Raises:
            CheckpointError: the folder holds no usable Qwen3-VL.
            DeviceError: CUDA is asked and not there.
            RequestError: device, dtype or format is not one of these, or both hold and weight_format are given.
        """
        from ..components import pick_device, pick_dtype

        if hold is not None and weight_format is not None:
            raise RequestError(f"weight_format must be part of hold where hold is given, got {weight_format!r} as well")
        hold = hold or Hold(weight_format or "bf16")
        chosen = pick_device(device)
        return cls(
            VLEncoder(
                open_vl(path),
                chosen,
                pick_dtype(torch_dtype, chosen),
                hold=hold,
                cache=cache or default_cache(),
                alone=alone,
                progress=progress,
            )
        )

    @property
    def source(self) -> VLSource:
        """The opened model."""
        return self.encoder.source

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return self.source.hidden_size

    @property
    def layers(self) -> int:
        """Decoder layers of the model; hidden layers are -1 to minus this."""
        return self.source.layers

    @property
    def variant(self) -> str:
        """``instruct`` or ``thinking``."""
        return self.source.variant

    @property
    def counters(self) -> Counters:
        """What was done, for tests and benchmarks."""
        return self.encoder.counters

    @property
    def tape(self) -> Tape | None:
        """The decoder layers, if they are loaded."""
        return self.encoder.tape

    def unload(self) -> None:
        """Free all weights for good."""
        self.encoder.release()
        self._unloaded = True

    def extract(  # noqa: PLR0913 (the options by name)
        self,
        image: Picture | Sequence[Picture],
        text: str | None = None,
        *,
        hidden_layer: Layers = Knobs.hidden_layer,
        image_tokens_only: bool = False,
        text_tokens_only: bool = False,
        token_selection: Selection | None = None,
        scale_to_text: bool = Knobs.scale_to_text,
        target_std: float | Literal["auto"] = Knobs.target_std,
        normalization_mode: Normalisation = Knobs.normalization_mode,
        scale_stat: ScaleStat = Knobs.scale_stat,
        outlier_masking: OutlierMode = Knobs.outlier_masking,
        outlier_threshold: float = Knobs.outlier_threshold,
        outlier_direction: Direction = Knobs.outlier_direction,
        system_prompt: str | None = None,
        think_block: bool = False,
        mask_tokens: Sequence[int] = (),
        mask_mode: MaskMode = "attention",
        statistics: Statistics | str | Path | None = None,
        text_embeds: torch.Tensor | None = None,
        implementation: str = "reference",
        check: Callable[[], None] | None = None,
    ) -> VLExtractionResult:
        """Embeddings of pictures: :meth:`raw`, then :func:`condition`.

        Args:
            image: a picture, or several: file, bytes or image.
            text: a description that follows the pictures; it changes the text rows only.
            hidden_layer: -1 (after the final norm) to -layers, or {layer: weight}.
            image_tokens_only: short for ``token_selection="image"``.
            text_tokens_only: short for ``token_selection="text"``.
            token_selection: ``all``, ``image`` (with markers), ``image_no_markers`` or ``text``.
            scale_to_text: normalise at all.
            target_std: std after ``global``; ``auto`` takes that of ``text_embeds``.
            normalization_mode: ``global``, ``per_dim`` or ``hybrid``.
            scale_stat: ``global`` or ``robust``.
            outlier_masking: ``none``, ``zero``, ``clamp`` or ``scale``.
            outlier_threshold: ratio above which a column is an outlier.
            outlier_direction: ``high``, ``low`` or ``both``.
            system_prompt: a system message before all.
            think_block: end the chat with an empty think block.
            mask_tokens: image tokens, counted over all pictures, that no other token may see.
            mask_mode: ``attention`` keeps their rows, ``remove`` leaves them out.
            statistics: reference statistics or their file, for ``per_dim``, ``hybrid`` and masking.
            text_embeds: [T, D] for ``target_std="auto"``.
            implementation: of the normalisation ops.
            check: called before the vision tower and before each layer; may raise to stop.

        Raises:
            UnloadedError: the extractor was unloaded (also a RuntimeError).
            RequestError: an option is out of range or contradicts another.
            InputError: a picture cannot be read.
            CheckpointError: the model is damaged.
        """
        knobs = Knobs(
            hidden_layer=hidden_layer,
            token_selection=select_tokens(image_tokens_only, text_tokens_only, token_selection),
            scale_to_text=scale_to_text,
            target_std=target_std,
            normalization_mode=normalization_mode,
            scale_stat=scale_stat,
            outlier_masking=outlier_masking,
            outlier_threshold=outlier_threshold,
            outlier_direction=outlier_direction,
        )
        raw = self.raw(
            image,
            text,
            knobs.layers,
            system_prompt=system_prompt,
            think_block=think_block,
            mask_tokens=mask_tokens,
            mask_mode=mask_mode,
            check=check,
        )
        return condition(raw, knobs, statistics=statistics, text_embeds=text_embeds, implementation=implementation)

    def raw(  # noqa: PLR0913 (the options by name)
        self,
        images: Picture | Sequence[Picture],
        text: str | None = None,
        layers: Sequence[int] = (Knobs.hidden_layer,),  # pyright: ignore[reportArgumentType]
        *,
        system_prompt: str | None = None,
        think_block: bool = False,
        mask_tokens: Sequence[int] = (),
        mask_mode: MaskMode = "attention",
        check: Callable[[], None] | None = None,
    ) -> RawExtraction:
        """Raw hidden states of one or several layers, in one pass that stops at the deepest; see :meth:`extract`."""
        if self._unloaded:
            raise UnloadedError("extractor must be loaded to extract, got one that was unloaded", hint="open it again")
        return self.encoder.raw(
            images,
            text,
            layers,
            system_prompt=system_prompt,
            think_block=think_block,
            mask_tokens=mask_tokens,
            mask_mode=mask_mode,
            check=check,
        )


def _width_notes(width: int) -> tuple[str, ...]:
    if width == Z_IMAGE_WIDTH:
        return ()
    return (f"hidden size of the Qwen3-VL model is {width}; Z-Image takes {Z_IMAGE_WIDTH}",)
