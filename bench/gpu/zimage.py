"""Z-Image at true size with random weights, 1024x1024, resident and under ceilings, by the bench of the edit model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.latents import initial_noise
from ...engine.plan import JobFacts
from ...engine.schedule import Schedule
from ...engine.stack import Hold
from ...engine.zimage import ZImageTransformer
from ...engine.zimage.guidance import Guidance
from ...engine.zimage.schedule import make_zimage_schedule
from ...loaders.component import Component
from ...loaders.source import ModelSource
from ...loaders.zimage import SCHEDULER_DEFAULTS, shapes
from ..true_shapes import Z_TEXT_ENCODER, Z_TRANSFORMER, Z_VAE
from .engine import measuring
from .geometry import SEED, Evaluate
from .weights import random_source
from .worker import Run, serve

CASES = ("fp8 resident", "fp8 8GiB", "fp8 6GiB", "bf16 8GiB", "int8 6GiB", "bf16 resident")
TOY_CASES = ("fp8 resident", "fp8 swap2", "int8 sequential", "int8 resident")


@dataclass(frozen=True, kw_only=True)
class ZGeometry:
    """Z-Image in configs and a request in numbers; see :class:`.geometry.Geometry`."""

    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    grid: tuple[int, int]
    text_tokens: tuple[int, ...]
    steps: int
    dtype: torch.dtype
    guidance: float = 0.0

    def job(self) -> JobFacts:
        """The request as the planner sees it."""
        return JobFacts(
            kind="generate",
            target=self.grid,
            prompt_tokens=self.text_tokens,
            shared_tokens=3 if len(self.text_tokens) > 1 else 0,
            dropped_tokens=0,
            steps=self.steps,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def source(self) -> ModelSource:
        """A model of this geometry with random weights and no files."""
        parts = {
            "transformer": (self.transformer, shapes.transformer_shapes(self.transformer)),
            "vae": (self.vae, shapes.vae_shapes(self.vae)),
            "text_encoder": (self.text_encoder, shapes.text_encoder_shapes(self.text_encoder)),
        }
        return random_source("z-image-turbo", parts, SCHEDULER_DEFAULTS)

    def schedule(self) -> Schedule:
        """Noise levels."""
        return make_zimage_schedule(self.steps, SCHEDULER_DEFAULTS)

    def load(self, component: Component, device: torch.device, hold: Hold) -> ZImageTransformer:
        """The transformer on its tape."""
        return ZImageTransformer.load(component, device=device, dtype=self.dtype, cache=None, hold=hold)

    def begin(self, transformer: ZImageTransformer, device: torch.device) -> tuple[torch.Tensor, Evaluate]:
        """Noise, and what a step computes: all prompts inside each block's visit."""
        generator, width = torch.Generator().manual_seed(SEED), self.transformer["cap_feat_dim"]
        prompts = [torch.randn(tokens, width, generator=generator).to(device) for tokens in self.text_tokens]
        contexts, guidance = transformer.contexts(prompts, *self.grid), Guidance(self.guidance)

        def evaluate(latents: torch.Tensor, table: Any, timestep: float, more: bool) -> torch.Tensor:
            return guidance.combine(transformer.velocity(latents.to(self.dtype), contexts, table, timestep, more=more))

        return initial_noise(SEED, self.transformer["in_channels"], *self.grid).to(device), evaluate


TURBO = ZGeometry(
    transformer=Z_TRANSFORMER,
    text_encoder=Z_TEXT_ENCODER,
    vae=Z_VAE,
    grid=(64, 64),
    text_tokens=(120,),
    steps=5,
    dtype=torch.bfloat16,
)

TOY = ZGeometry(
    transformer={
        **Z_TRANSFORMER,
        "dim": 96,
        "n_heads": 3,
        "n_kv_heads": 3,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "cap_feat_dim": 64,
        "axes_dims": [8, 12, 12],
    },
    text_encoder={
        **Z_TEXT_ENCODER,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "intermediate_size": 128,
        "vocab_size": 256,
    },
    vae={**Z_VAE, "block_out_channels": [32, 32, 64, 64]},
    grid=(4, 6),
    text_tokens=(12, 9),
    steps=2,
    dtype=torch.float32,
    guidance=3.0,
)


def zimage(toy: bool) -> Run:
    """What measures a case ``FORMAT PLACE`` of Z-Image."""
    return measuring(TOY if toy else TURBO, toy)


if __name__ == "__main__":
    serve(zimage)
