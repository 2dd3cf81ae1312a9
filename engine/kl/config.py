"""Sizes of a flux-type autoencoder, from its config alone; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError


@dataclass(frozen=True)
class KlConfig:
    """The sizes of one AutoencoderKL, from the ``config.json`` that diffusers writes.

    Attributes:
        block_out_channels: width of every level, the picture's first.
        layers_per_block: residual blocks of an encoder level; a decoder level has one more.
        latent_channels: channels of a latent.
        norm_num_groups: groups of every norm.
        scaling_factor: a normalised latent is ``(mean - shift_factor) * scaling_factor``.
        shift_factor: see there.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float
    input_channels: int = 3

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> KlConfig:
        """Read a diffusers config that the loader has checked against the tensors.

        Raises:
            CheckpointError: an entry is missing.
        """
        keys = ("layers_per_block", "latent_channels", "norm_num_groups", "scaling_factor", "shift_factor")
        missing = [key for key in ("block_out_channels", *keys) if config.get(key) is None]
        if missing:
            raise CheckpointError(f"VAE config must name {', '.join(missing)}, got none")
        return cls(tuple(config["block_out_channels"]), *(config[key] for key in keys))

    @property
    def scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def z_dim(self) -> int:
        """Channels of a latent."""
        return self.latent_channels

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """What a normalised latent is centred at, per channel."""
        return (self.shift_factor,) * self.latent_channels

    @property
    def latents_std(self) -> tuple[float, ...]:
        """What a normalised latent is divided by, per channel."""
        return (1 / self.scaling_factor,) * self.latent_channels
