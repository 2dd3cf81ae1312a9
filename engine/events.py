"""What a stream yields: Encoded once, a Step per step, Decoded once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .conditioning import Conditioning
from .latents import unpack
from .reference.options import StepReference
from .state import RunState

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Encoded:
    """Prompt and pictures are encoded.

    Attributes:
        conditioning: prompt embeddings.
        cached: whether they came from the cache, so that the encoder was not needed.
        notes: what was decided and should be told, one sentence each.
    """

    conditioning: Conditioning
    cached: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One denoising step is done.

    Attributes:
        index: 0 to total - 1.
        total: steps of the run.
        sigma: noise level the step started from.
        sigma_next: noise level it reached.
        state: everything needed to go on from here; ``state.save(path)`` writes it.
        predicted: predicted clean latents ``x - sigma * v``, float32 [1, z, 1, h, w].
        mask: share of change per token where a mask is at work, else None.
        reference: method and strengths of the references in this step; None without pictures.
        notes: what happened in this step and should be told, one sentence each.
    """

    index: int
    total: int
    sigma: float
    sigma_next: float
    state: RunState
    predicted: torch.Tensor = field(repr=False)
    projection: torch.Tensor = field(repr=False)
    size: tuple[int, int]
    mask: torch.Tensor | None = None
    reference: StepReference | None = None
    notes: tuple[str, ...] = ()

    @property
    def latents(self) -> torch.Tensor:
        """Latents after the step, float32 [1, z, 1, h, w]."""
        return unpack(self.state.latent_tokens, *self.state.grid)

    def preview(self) -> Image.Image:
        """RGB of the predicted clean picture by one affine map per latent pixel, scaled to the output's size.

        Costs [h * w, z] x [z, 3]; the VAE is not run.
        """
        from .preview import draw

        return draw(self.predicted, self.projection, self.size)

    def save(self, path: str | Path) -> None:
        """Write the run's state; ``engine.stream(request, resume=RunState.load(path))`` goes on bit-identically."""
        self.state.save(Path(path))


@dataclass(frozen=True)
class Decoded:
    """The picture.

    Attributes:
        image: RGB picture of exactly the asked size.
        latents: final latents, float32 [1, z, 1, h, w], on the CPU.
        metadata: everything that ``rerun`` needs, as JSON values.
        notes: what happened on the way and should be told, one sentence each.
    """

    image: Image.Image
    latents: torch.Tensor = field(repr=False)
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What ``edit()`` and ``generate()`` return: the fields of :class:`Decoded`, the notes and the wall time.

    Attributes:
        image: RGB picture.
        latents: final latents, float32 [1, z, 1, h, w], on the CPU.
        metadata: everything that ``rerun`` needs.
        notes: what was decided on the way.
        seconds: wall time per phase: ``encode``, ``denoise``, ``decode``.
    """

    image: Image.Image
    latents: torch.Tensor = field(repr=False)
    metadata: dict[str, Any]
    notes: tuple[str, ...]
    seconds: dict[str, float]
