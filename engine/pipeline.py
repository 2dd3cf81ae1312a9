"""The engine in the words that Z-Image's users know from diffusers: a pipeline, embeddings, a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, RequestError
from ..loaders.variant import ZIMAGE
from .given import Given
from .request import GenerateRequest
from .session import Engine

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | str | PathLike[str]

EMBEDDED = "(embeddings)"
"""Stands for the prompt where only its embeddings are known."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a call made.

    Attributes:
        images: one picture.
    """

    images: list[Image.Image]


class ZImagePipeline:
    """Z-Image and Z-Image-Turbo. Use :meth:`from_pretrained`, and ``with`` to free it.

    Args:
        engine: an opened Z-Image model.

    Attributes:
        engine: the same, for all that this class has no words for.

    Raises:
        CheckpointError: the model is of another kind.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.source.variant not in ZIMAGE:
            raise CheckpointError(f"model of a ZImagePipeline must be a Z-Image, got {engine.source.variant}")
        self.engine = engine

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        torch_dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        **options: Any,
    ) -> ZImagePipeline:
        """Open a model; weights are read when they are needed.

        Args:
            path: a diffusers folder, or a hub id.
            torch_dtype: ``auto``, float32 or bfloat16.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            options: as ``Engine.open`` takes them, e.g. ``budget`` and ``choices``.

        Raises:
            CheckpointError: the model is missing, incomplete or of another kind.
            DeviceError: the device is not there.
        """
        return cls(Engine.open(path, device=device, dtype=torch_dtype, **options))

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """Embeddings of a prompt [T, D] on the CPU, to be blended or given back as ``prompt_embeds``.

        Raises:
            RequestError: the prompt is empty or too long.
        """
        return (
            self.engine.encode(GenerateRequest(prompt=prompt, guidance_scale=0), wait=True)
            .conditioning.to(torch.device("cpu"))
            .prompt_embeds
        )

    def __call__(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: torch.Tensor | Sequence[torch.Tensor] | None = None,
        width: int | None = None,
        height: int | None = None,
        generator: torch.Generator | int | None = None,
        **fields: Any,
    ) -> PipelineOutput:
        """Make a picture of a prompt or its embeddings.

        Args:
            prompt: in words; or ``prompt_embeds``.
            prompt_embeds: [T, D] or [1, T, D], of :meth:`encode_prompt` or blended with a picture's.
            width: in pixels, with ``height``.
            height: in pixels, with ``width``.
            generator: its first seed is the seed; or the seed itself; 0 where there is none.
            fields: others of :class:`GenerateRequest`, e.g. ``num_inference_steps`` and ``guidance_scale``.

        Raises:
            RequestError: neither or both of prompt and embeddings are given, or a value is out of range.
        """
        if (width is None) != (height is None):
            raise RequestError(f"size must be a width and a height, got {width} and {height}")
        if width is not None and height is not None:
            fields["size"] = (width, height)
        if prompt_embeds is not None:
            fields["given"] = Given(prompt_embeds=_matrix(prompt_embeds))
        if (prompt is None) == (prompt_embeds is None):
            raise RequestError(
                "prompt must be given in words or as prompt_embeds, got " + ("none", "both")[bool(prompt)]
            )
        return PipelineOutput([self.engine.generate(prompt or EMBEDDED, seed=_seed(generator), **fields).image])

    def img2img(
        self,
        prompt_embeds: torch.Tensor | Sequence[torch.Tensor] | None = None,
        image: Picture | None = None,
        strength: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | int | None = None,
        *,
        prompt: str | None = None,
        **fields: Any,
    ) -> PipelineOutput:
        """Make a picture from another one with noise on it.

        Args:
            prompt_embeds: as in a call; or ``prompt``.
            image: to start from.
            strength: share of the steps that are run, 0 to 1; None is 0.75.
            num_inference_steps: network evaluations of a whole schedule; None is the model's.
            generator: as in a call.
            prompt: in words.
            fields: as in a call.

        Raises:
            RequestError: there is no picture, or as in a call.
        """
        if image is None:
            raise RequestError("image must be given to start from, got none")
        fields |= {"init_image": image, "strength": strength, "num_inference_steps": num_inference_steps}
        return self(prompt, prompt_embeds=prompt_embeds, generator=generator, **fields)

    def close(self) -> None:
        """Free the weights."""
        self.engine.close()

    def __enter__(self) -> ZImagePipeline:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _matrix(embeds: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    found = embeds if isinstance(embeds, torch.Tensor) else list(embeds)
    if isinstance(found, list):
        if len(found) != 1:
            raise RequestError(f"prompt_embeds must be of one prompt, got {len(found)}")
        found = found[0]
    if found.dim() == 3 and len(found) == 1:
        found = found[0]
    if found.dim() != 2:
        raise RequestError(f"prompt_embeds must be [T, D], got {list(found.shape)}")
    return found


def _seed(generator: torch.Generator | int | None) -> int:
    if generator is None:
        return 0
    return generator.initial_seed() if isinstance(generator, torch.Generator) else generator
