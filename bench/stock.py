"""The rival and reference: diffusers' own pipelines on the same files, able to run without torchvision.

``Qwen2VLProcessor`` needs torchvision for a video processor that nobody here uses; :class:`Processor` stands in for it.
diffusers 0.42.1 also leaves out the token types from which transformers 5 builds the 3-D positions of vision tokens;
:func:`give_mrope_back` passes them, since the models were trained with them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import BatchFeature, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PIPELINES = {cls.__name__: cls for cls in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)}


class Processor:
    """What the edit pipelines need of ``Qwen2VLProcessor``: the tokenizer and the PIL image processor."""

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer: Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def __call__(
        self, text: str | Sequence[str], images: Any = None, padding: bool = False, return_tensors: str | None = None
    ) -> BatchFeature:
        """Expand each image placeholder to its number of merged patches, then tokenize."""
        texts = [text] if isinstance(text, str) else list(text)
        pictures: dict[str, Any] = {}
        if images is not None:
            pictures = dict(self.image_processor(images=images, return_tensors=return_tensors))
            merged = self.image_processor.merge_size**2
            counts = iter([int(grid.prod()) // merged for grid in pictures["image_grid_thw"]])
            texts = [self._expand(entry, counts) for entry in texts]
        tokens = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature(data={**tokens, **pictures})

    def _expand(self, text: str, counts: Iterator[int]) -> str:
        head, *tails = text.split(self.image_token)
        return head + "".join(self.image_token * next(counts) + tail for tail in tails)


def give_mrope_back(text_encoder: Qwen2_5_VLForConditionalGeneration) -> None:
    """Make the encoder receive ``mm_token_type_ids``, so that image tokens get their 3-D positions."""
    forward = text_encoder.forward
    image_token_id = text_encoder.config.image_token_id

    @functools.wraps(forward)
    def with_types(*args: Any, **kwargs: Any) -> Any:
        kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == image_token_id).int()
        return forward(*args, **kwargs)

    text_encoder.forward = with_types  # pyright: ignore[reportAttributeAccessIssue]


@contextlib.contextmanager
def reference_areas(vae_pixels: int, condition_pixels: int) -> Iterator[None]:
    """Inside, diffusers' edit pipelines bring pictures to these areas instead of 1024^2 and 384^2.

    The first edit pipeline has one area for both, ``vae_pixels``.
    """
    plus, edit = (sys.modules[cls.__module__] for cls in (QwenImageEditPlusPipeline, QwenImageEditPipeline))
    dimensions = edit.calculate_dimensions
    with (
        mock.patch.object(plus, "VAE_IMAGE_SIZE", vae_pixels),
        mock.patch.object(plus, "CONDITION_IMAGE_SIZE", condition_pixels),
        mock.patch.object(edit, "calculate_dimensions", lambda _, ratio: dimensions(vae_pixels, ratio)),
    ):
        yield


def stock_pipeline(folder: Path, *, mrope: bool = True, **loading: Any) -> Any:
    """The diffusers pipeline of a folder, assembled from its parts.

    Args:
        folder: a model in diffusers layout.
        mrope: False leaves the positions of vision tokens sequential, as diffusers 0.42.1 does by itself.
        loading: passed to every ``from_pretrained`` of a model (``torch_dtype`` and the like).
    """
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", **loading)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        "vae": AutoencoderKLQwenImage.from_pretrained(folder / "vae", **loading),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": QwenImageTransformer2DModel.from_pretrained(folder / "transformer", **loading),
    }
    if PIPELINES[name] is not QwenImagePipeline:
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
        parts["processor"] = Processor(tokenizer, image_processor)
    if mrope:
        give_mrope_back(text_encoder)
    pipeline = PIPELINES[name](**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
