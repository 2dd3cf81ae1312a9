"""What is run: Qwen-Image-Edit-2511 at 1024x1024 with one reference and two branches, and a toy of the same form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...engine.dit import QwenImageTransformer
from ...engine.latents import combine, initial_noise
from ...engine.plan import JobFacts
from ...engine.schedule import Schedule, make_schedule
from ...engine.stack import Hold
from ...loaders import shapes
from ...loaders.component import Component
from ...loaders.source import ModelSource
from ..true_shapes import TEXT_ENCODER, TRANSFORMER, VAE
from .weights import random_source

DROPPED_TOKENS = 64
SEED = 7

Evaluate = Callable[[torch.Tensor, Any, float, bool], torch.Tensor]
"""(latents, modulation rows, timestep, whether another step follows) to the guided velocity, float32."""


class Measured(Protocol):
    """What the bench needs to know of a geometry."""

    @property
    def steps(self) -> int:
        """Denoising steps of a run."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        ...

    def job(self) -> JobFacts:
        """The request as the planner sees it."""
        ...

    def source(self) -> ModelSource:
        """A model of this geometry with random weights and no files."""
        ...

    def schedule(self) -> Schedule:
        """Noise levels."""
        ...

    def load(self, component: Component, device: torch.device, hold: Hold) -> Any:
        """The transformer on its tape."""
        ...

    def begin(self, transformer: Any, device: torch.device) -> tuple[torch.Tensor, Evaluate]:
        """Noise, and what a step computes."""
        ...


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A model in configs and a request in numbers.

    Attributes:
        transformer: its config.json; ``text_encoder`` and ``vae`` likewise, which only the plan reads.
        grid: token rows and columns of the target, and of the one reference.
        patches: patch rows and columns of the reference in the vision tower.
        text_tokens: of the prompt and of the negative prompt.
        steps: denoising steps of a run.
        dtype: compute dtype.
        guidance: ``true_cfg_scale``.
    """

    transformer: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    vae: Mapping[str, Any]
    grid: tuple[int, int]
    patches: tuple[int, int]
    text_tokens: tuple[int, int]
    steps: int
    dtype: torch.dtype
    guidance: float = 4.0

    @property
    def blocks(self) -> int:
        """Blocks of the transformer."""
        return self.transformer["num_layers"]

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.vae["z_dim"]

    def job(self) -> JobFacts:
        """The request as the planner sees it."""
        return JobFacts(
            kind="edit",
            target=self.grid,
            references=(self.grid,),
            patches=(self.patches,),
            prompt_tokens=tuple(DROPPED_TOKENS + tokens for tokens in self.text_tokens),
            shared_tokens=DROPPED_TOKENS + self.patches[0] * self.patches[1] // 4,
            dropped_tokens=DROPPED_TOKENS,
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
        return random_source("qwen-image-edit-2511", parts, SCHEDULER)

    def schedule(self) -> Schedule:
        """Noise levels of the picture's size."""
        return make_schedule(self.steps, self.grid[0] * self.grid[1], SCHEDULER)

    def load(self, component: Component, device: torch.device, hold: Hold) -> QwenImageTransformer:
        """The transformer on its tape."""
        return QwenImageTransformer.load(component, device=device, dtype=self.dtype, cache=None, hold=hold)

    def begin(self, transformer: QwenImageTransformer, device: torch.device) -> tuple[torch.Tensor, Evaluate]:
        """Noise, and what a step computes: both branches beside the reference, guided."""
        latents, references, prompts = inputs(self, device)
        branches = [transformer.branch(prompt, (self.grid, self.grid)) for prompt in prompts]

        def evaluate(latents: torch.Tensor, table: Any, timestep: float, more: bool) -> torch.Tensor:
            tokens = latents.to(self.dtype)
            velocities = transformer.velocity(tokens, references, branches, table, timestep, more=more)
            return combine(velocities[0].float(), velocities[1].float(), self.guidance)

        return latents, evaluate


def inputs(geometry: Geometry, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Noise [1, tokens, channels] in float32, reference tokens and the embedded prompts [tokens, width]."""
    generator = torch.Generator().manual_seed(SEED)
    noise = initial_noise(SEED, geometry.channels, *geometry.grid)
    references = torch.randn(noise.shape, generator=generator)
    width = geometry.transformer["joint_attention_dim"]
    prompts = [torch.randn(tokens, width, generator=generator) for tokens in geometry.text_tokens]
    return (
        noise.to(device),
        references.to(device, geometry.dtype),
        [prompt.to(device, geometry.dtype) for prompt in prompts],
    )


SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}

EDIT_2511 = Geometry(
    transformer=TRANSFORMER,
    text_encoder=TEXT_ENCODER,
    vae=VAE,
    grid=(64, 64),
    patches=(28, 28),
    text_tokens=(250, 243),
    steps=5,
    dtype=torch.bfloat16,
)

TOY = Geometry(
    transformer={
        **EDIT_2511.transformer,
        "num_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": [8, 12, 12],
    },
    text_encoder={
        "text_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
            "vocab_size": 256,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    vae={**EDIT_2511.vae, "base_dim": 8},
    grid=(4, 4),
    patches=(4, 4),
    text_tokens=(12, 9),
    steps=2,
    dtype=torch.float32,
)
