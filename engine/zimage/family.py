"""Z-Image and Z-Image-Turbo, as the engine runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..family import Shape
from ..kl import KlVAE
from ..kl.config import KlConfig
from ..reference.apply import Cast
from ..schedule import Schedule
from ..stack import BlockStack, Hold
from ..stack.pack import Progress
from .config import PATCH, ZImageConfig
from .encoder import ZImageEncoder
from .guidance import Guidance
from .model import Context, ZImageTransformer
from .modulation import RowTable
from .schedule import make_zimage_schedule

if TYPE_CHECKING:
    from ...loaders import Component, ModelSource
    from ..conditioning import Conditioning
    from ..job import Job
    from ..seen import Seen


@dataclass(frozen=True)
class ZImageNetwork:
    """One run's fixed parts.

    Attributes:
        schedule: noise levels.
        guidance: how the velocities of both prompts become one.
        prompts: embeddings of the prompt, and of the negative prompt where guidance is on.
        grid: token rows and columns of the picture.
        contexts: the prompts as the blocks see them.
        table: modulation rows of the steps that are run.
        dtype: compute dtype.
    """

    schedule: Schedule
    guidance: Guidance
    prompts: tuple[torch.Tensor, ...]
    grid: tuple[int, int]
    contexts: tuple[Context, ...]
    table: RowTable
    dtype: torch.dtype

    def velocity(
        self,
        index: int,
        latents: torch.Tensor,
        transformer: ZImageTransformer,
        kernels: Mapping[str, str],
        *,
        safe: bool,
        check: Callable[[], None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`engine.family.Network`."""
        timestep = self.schedule.timestep(index, self.dtype)
        contexts = self._mended(transformer) if safe else self.contexts
        velocities = transformer.velocity(
            latents.to(self.dtype),
            contexts if self.guidance.is_on(timestep) else contexts[:1],
            self.table,
            timestep,
            more=index + 1 < len(self.schedule),
            safe=safe,
            check=check,
        )
        return latents, self.guidance.combine(velocities)

    def _mended(self, transformer: ZImageTransformer) -> tuple[Context, ...]:
        """The contexts, made anew as they are defined where one of them is not finite."""
        if all(bool(context.caption.isfinite().all()) for context in self.contexts):
            return self.contexts
        return transformer.contexts(self.prompts, *self.grid, safe=True)


class ZImageFamily:
    """Z-Image and Z-Image-Turbo; see :class:`engine.family.Family`."""

    def shape(self, source: ModelSource) -> Shape:
        """Its widths, from the configs."""
        config, vae = ZImageConfig.from_dict(source.transformer.config), KlConfig.parse(source.vae.config)
        return Shape(PATCH * vae.scale_factor, vae.z_dim, config.cap_feat_dim, config.caption_limit)

    def open_encoder(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        cache: Path,
        *,
        alone: bool,
        progress: Progress,
    ) -> ZImageEncoder:
        """The prompt encoder; no weight is read. It has no vision tower that could be freed alone."""
        return ZImageEncoder(source, device, dtype, hold=hold, cache=cache, progress=progress)

    def stack(
        self, component: Component, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str]
    ) -> BlockStack[Any]:
        """The transformer's blocks in a weight format; no weight is read."""
        return ZImageTransformer.stack(component, weight_format, dtype, kernels)

    def load_transformer(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path,
        hold: Hold,
        progress: Progress,
    ) -> ZImageTransformer:
        """Read the transformer."""
        return ZImageTransformer.load(component, device=device, dtype=dtype, cache=cache, hold=hold, progress=progress)

    def load_vae(
        self,
        component: Component,
        device: torch.device,
        dtype: torch.dtype,
        tile_pixels: int | None,
        weight_format: str,
    ) -> KlVAE:
        """Read the VAE."""
        return KlVAE.load(component, device=device, dtype=dtype, vae_tile=tile_pixels, weight_format=weight_format)

    def schedule(self, job: Job, config: Mapping[str, Any]) -> Schedule:
        """The static schedule, all of it: where a run starts, the job says."""
        how = job.schedule or "modern"
        return make_zimage_schedule(job.num_inference_steps, config, schedule=how, shift=job.flow_shift)

    def network(
        self,
        job: Job,
        schedule: Schedule,
        conditionings: Mapping[Cast, Conditioning],
        seen: Seen,
        transformer: ZImageTransformer,
        dtype: torch.dtype,
    ) -> ZImageNetwork:
        """Refine the captions and compute the modulation rows."""
        known = conditionings[()]
        prompts = (known.prompt_embeds, *(() if known.negative_embeds is None else (known.negative_embeds,)))
        return ZImageNetwork(
            schedule=schedule,
            guidance=Guidance(job.guidance_scale or 0.0, job.cfg_normalization, job.cfg_truncation),
            prompts=prompts,
            grid=job.target.grid,
            contexts=transformer.contexts(prompts, *job.target.grid),
            table=transformer.table([schedule.timestep(i, dtype) for i in range(job.start, len(schedule))]),
            dtype=dtype,
        )
