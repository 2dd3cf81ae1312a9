"""Reference pictures in the steps of a run: what the network reads, and how much it weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image

from ..dit import Branch, Emphasis, Grid, Run
from ..keep.pixels import token_mask
from ..latents import pack, unpack
from .options import Reference, StepReference

if TYPE_CHECKING:
    from ..job import Geometry, Job
    from ..picture import Picture

Cast = tuple[int, ...]
"""Places of the pictures that are there, in their order."""


@dataclass(frozen=True)
class Sight:
    """One picture as a reference.

    Attributes:
        latents: clean latents, packed [1, rows * columns, 4z].
        grid: its token rows and columns.
        shares: of its mask per token, float32 [rows * columns], 0 to 1; None without a mask.
    """

    latents: torch.Tensor
    grid: Grid
    shares: torch.Tensor | None = None

    @property
    def kept(self) -> torch.Tensor:
        """Places of its tokens that are there: where the mask is not 0."""
        if self.shares is None:
            return torch.arange(self.latents.shape[1], device=self.latents.device)
        return self.shares.nonzero()[:, 0]

    @property
    def soft(self) -> torch.Tensor | None:
        """Shares of the tokens that are there, where one of them is not 1."""
        if self.shares is None:
            return None
        shares = self.shares[self.kept]
        return shares if bool((shares < 1).any()) else None

    def onto(self, grid: Grid) -> torch.Tensor:
        """``latents * shares``, resized bilinearly to another grid: float32 [1, rows * columns, 4z]."""
        latents = self.latents if self.shares is None else self.latents * self.shares[:, None]
        if grid == self.grid:
            return _wide(latents)
        planes = unpack(_wide(latents), *self.grid)[:, :, 0]
        rows, columns = grid
        return pack(F.interpolate(planes, (2 * rows, 2 * columns), mode="bilinear", align_corners=False)[:, :, None])


@dataclass(frozen=True)
class Given:
    """What one step starts from.

    Attributes:
        state: latents that the Euler step starts from, packed [1, tokens, 4z].
        latents: what the network reads as the target.
        tokens: what it reads as references [1, reference tokens, 4z], or None.
        emphasis: how the references weigh; None as trained.
    """

    state: torch.Tensor
    latents: torch.Tensor
    tokens: torch.Tensor | None = None
    emphasis: Emphasis | None = None

    def dress(self, branches: Sequence[Branch], options: Reference, dtype: torch.dtype) -> tuple[Branch, ...]:
        """The branches of this step: the negative one reads the state alone where it is to see no references."""
        if self.tokens is None:
            return tuple(branches)
        seeing = [replace(branch, emphasis=self.emphasis) for branch in branches]
        if len(seeing) > 1 and not options.negative:
            seeing[1] = replace(branches[1], tokens=self.state.to(dtype))
        return tuple(seeing)


@dataclass(frozen=True)
class References:
    """The references of a run; every method follows from its arguments alone.

    Attributes:
        options: of the request.
        table: what they do in each step.
        sights: one per picture; None for a picture that is in no step.
        target: token grid of the output.
    """

    options: Reference
    table: tuple[StepReference, ...]
    sights: tuple[Sight | None, ...]
    target: Grid

    @classmethod
    def of(cls, job: Job, latents: Sequence[torch.Tensor | None]) -> References:
        """From a job and the packed latents of its pictures, None for those that are in no step."""
        masks = job.masks or (None,) * len(job.references)
        sights = [
            None if packed is None else Sight(packed, geometry.grid, _shares(mask, geometry, packed.device))
            for packed, geometry, mask in zip(latents, job.references, masks, strict=True)
        ]
        return cls(job.reference, job.table, tuple(sights), job.target.grid)

    def at(self, index: int, latents: torch.Tensor, sigma: float) -> Given:
        """What a step starts from.

        With strengths s, shares m of a mask, clean latents r and the target x:

        - ``default``: tokens r, ``ln s + ln m`` on their logits; with the mode ``latent`` tokens ``s r``.
        - ``concat``: tokens ``s m r``.
        - ``cross_attn``: tokens r, keys ``s K``, ``ln m`` on their logits; by its rule ``gain`` as ``default``.
        - ``inject``: tokens ``m r`` as ``default`` with min(s, 1), and ``x + s (1 - sigma) gain (m r)`` of the first
          picture that is there, resized to the target, in place of x.

        Only logits and keys that text and target look at change. Tokens with m = 0 are not there; they keep their
        positions.

        Args:
            index: of the step.
            latents: x, packed float32 [1, tokens, 4z]; not changed.
            sigma: noise level of the step.
        """
        step = self.table[index] if self.table else None
        if step is None or not step.present:
            return Given(latents, latents)
        cast = step.present
        tokens, runs = zip(*(self._weigh(self._sight(k), step.method, step.strengths[k]) for k in cast), strict=True)
        given = Given(latents, latents, torch.cat(tokens, dim=1), Emphasis.of(runs))
        if step.method != "inject":
            return given
        amount = step.strengths[cast[0]] * (1 - sigma) * self.options.inject_gain
        injected = latents if amount == 0 else latents + amount * self._sight(cast[0]).onto(self.target).to(latents)
        return replace(given, latents=injected, state=injected if self.options.inject_into == "state" else latents)

    def layout(self, cast: Cast) -> tuple[list[Grid], list[int] | None, torch.Tensor | None]:
        """Grids, frame positions and kept image tokens of the target and the pictures of a cast."""
        grids = [self.target, *(self._sight(k).grid for k in cast)]
        frames = [0, *(k + 1 for k in cast)] if self.options.keep_frame_index else None
        if all(self._sight(k).shares is None for k in cast):
            return grids, frames, None
        start = self.target[0] * self.target[1]
        kept = [torch.arange(start)]
        for k in cast:
            kept.append(start + self._sight(k).kept.cpu())
            start += self._sight(k).latents.shape[1]
        return grids, frames, torch.cat(kept)

    def _sight(self, place: int) -> Sight:
        sight = self.sights[place]
        if sight is None:
            raise RuntimeError(f"picture {place + 1} was not encoded")
        return sight

    def _weigh(self, sight: Sight, method: str, strength: float) -> tuple[torch.Tensor, Run]:
        """Tokens of one picture, and how they weigh."""
        soft, tokens = sight.soft, sight.latents
        if sight.shares is not None:
            tokens = tokens[:, sight.kept]
        if method == "inject":
            strength = min(strength, 1.0)
        multiplied = method in ("inject", "concat") and soft is not None
        if multiplied and soft is not None:
            tokens, soft = tokens * soft[:, None].to(tokens), None
        if strength == 1:
            return tokens, Run(tokens.shape[1], 0.0 if soft is None else soft.log())
        factor = 1.0
        if method == "concat" or (method in ("default", "inject") and self.options.mode == "latent"):
            tokens, gain = tokens * strength, 0.0
        elif method == "cross_attn" and self.options.cross_attn_rule == "scale":
            factor, gain = strength, 0.0
        else:
            gain = math.log(strength)
        return tokens, Run(tokens.shape[1], gain if soft is None else soft.log() + gain, factor)


def _shares(mask: Picture | None, geometry: Geometry, device: torch.device) -> torch.Tensor | None:
    if mask is None:
        return None
    image = mask.image.resize((geometry.width, geometry.height), Image.Resampling.BOX)
    shares = token_mask(image, geometry, "area").flatten().to(device)
    return None if bool((shares == 1).all()) else shares


def _wide(latents: torch.Tensor) -> torch.Tensor:
    return latents if latents.dtype == torch.float64 else latents.float()
