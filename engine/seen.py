"""What the VAE gives to a run before the transformer is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import RequestError
from .latents import pack, unpack
from .picture import resize, to_tensor

if TYPE_CHECKING:
    from .components import Components
    from .job import Geometry, Job


@dataclass(frozen=True)
class Seen:
    """Pictures as latents.

    Attributes:
        references: packed clean latents [1, tokens, 4z] of each picture; None for a picture that no step sees.
        first: packed clean latents at the size of the output, where the run needs them: of the picture to start from,
            else of the first picture.
        projection: affine map from latents to RGB for previews.
        channels: latent channels z.
    """

    references: tuple[torch.Tensor | None, ...]
    first: torch.Tensor | None
    projection: torch.Tensor
    channels: int

    @classmethod
    @torch.no_grad()
    def of(cls, job: Job, components: Components) -> Seen:
        """Encode the pictures of a run; those whose latents are given are taken as they are."""
        components.enter("reference")
        references = _references(job, components)
        first = _first(job, references, components) if job.anchored else None
        channels = components.family.shape(components.source).latent_channels
        return cls(tuple(references), first, components.projection(), channels)


@torch.no_grad()
def encode_all(job: Job, components: Components) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Latents [1, z, 1, h, w] of every picture, and of what a run may start from at the size of the output.

    The latter is None where that is nothing, or the first picture as the VAE sees it anyway.
    """
    components.enter("reference")
    packed = _references(job, components)
    references = tuple(
        unpack(tokens, *geometry.grid).cpu()
        for tokens, geometry in zip(packed, job.references, strict=True)
        if tokens is not None
    )
    wanted = job.init is not None or (job.given is not None and job.given.init is not None)
    if not wanted and (not job.anchored or _same(job)):
        return references, None
    return references, unpack(_first(job, packed, components), *job.target.grid).cpu()


def encode(image: Image.Image, geometry: Geometry, components: Components) -> torch.Tensor:
    """Packed clean latents of a picture [1, tokens, 4z], float32: the mode of the VAE's posterior."""
    return pack(components.vae.encode(pixels_of(image, geometry).to(components.device, components.dtype)))


def _references(job: Job, components: Components) -> list[torch.Tensor | None]:
    """Packed latents of the pictures that any step sees."""
    seen = {place for cast in job.casts for place in cast}
    return [_reference(job, place, components) if place in seen else None for place in range(len(job.references))]


def _reference(job: Job, place: int, components: Components) -> torch.Tensor:
    if job.given is not None and job.given.references:
        return _packed(job.given.references[place], components)
    return encode(job.pictures[place].image, job.references[place], components)


def _first(job: Job, references: list[torch.Tensor | None], components: Components) -> torch.Tensor:
    if job.given is not None and job.given.init is not None:
        return _packed(job.given.init, components)
    if job.init is not None:
        return encode(job.init.image, job.target, components)
    known = references[0] if _same(job) else None
    if known is not None:
        return known
    if not job.pictures:
        raise RequestError("init must be given where no step sees the first picture, got none")
    return encode(job.pictures[0].image, job.target, components)


def _same(job: Job) -> bool:
    """The VAE saw the first picture as the output is to be; of given latents only the cells are known."""
    first = job.references[0]
    return first == job.target if job.pictures else first.grid == job.target.grid


def _packed(latents: torch.Tensor, components: Components) -> torch.Tensor:
    return pack(latents.to(components.device, torch.float32))


def pixels_of(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    """The picture at its size, its right and lower edge repeated up to whole tokens: [1, 3, H, W]."""
    pixels = to_tensor(resize(image, geometry.width, geometry.height))
    width, height = geometry.padded
    return F.pad(pixels, (0, width - geometry.width, 0, height - geometry.height), mode="replicate")
