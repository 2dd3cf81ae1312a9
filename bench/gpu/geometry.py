"""What is run: Qwen-Image-Edit-2511 at 1024x1024 with one reference and two branches, and a toy of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...engine.plan import JobFacts
from ...loaders import shapes
from ...loaders.component import Component
from ...loaders.source import ModelSource
from ..true_shapes import TEXT_ENCODER, TRANSFORMER, VAE
from .weights import RandomCheckpoint

DROPPED_TOKENS = 64


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
        components = {
            name: Component(name, config, RandomCheckpoint(name, found)) for name, (config, found) in parts.items()
        }
        return ModelSource(
            label="random",
            variant="qwen-image-edit-2511",
            defaults="qwen-image-edit-2511",
            tokenizer_dir=Path("random"),
            processor_config={},
            scheduler_config=SCHEDULER,
            notes=(),
            fingerprint="random",
            **components,
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
