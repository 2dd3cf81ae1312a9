"""Geometry of a Z-Image transformer, from its config alone; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...errors import CheckpointError

PADDING = 32
"""Captions and images are padded, each by itself, to a multiple of this many tokens."""

PATCH = 2
MAX_TIME_CHANNELS = 256
_FIXED = {"all_patch_size": [PATCH], "all_f_patch_size": [1], "qk_norm": True}


@dataclass(frozen=True)
class ZImageConfig:
    """Geometry of a Z-Image transformer, with the names of its config.json."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ZImageConfig:
        """Read the known keys.

        Raises:
            CheckpointError: a key is missing, or the model is one that this engine does not run (with picture
                features, other patches, grouped keys or keys without a norm).
        """
        wanted = [field.name for field in fields(cls)]
        missing = [name for name in (*wanted, *_FIXED) if name not in config]
        if missing:
            raise CheckpointError(f"transformer config must name {', '.join(missing)}, got none")
        _check_fixed(config)
        known = {name: config[name] for name in wanted}
        known |= {name: tuple(known[name]) for name in ("axes_dims", "axes_lens")}
        made = cls(**known)
        made._check()
        return made

    def _check(self) -> None:
        if self.n_heads < 1 or self.dim % self.n_heads:
            raise CheckpointError(f"dim must be a multiple of n_heads {self.n_heads}, got {self.dim}")
        if sum(self.axes_dims) != self.head_dim or any(axis % 2 for axis in self.axes_dims):
            raise CheckpointError(
                f"axes_dims must be even and add up to the head size {self.head_dim}, got {list(self.axes_dims)}"
            )
        if len(self.axes_dims) != 3 or len(self.axes_lens) != 3:
            raise CheckpointError(
                f"axes_dims and axes_lens must have 3 entries, got {list(self.axes_dims)} and {list(self.axes_lens)}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Width inside the feed-forward layer."""
        return int(self.dim / 3 * 8)

    @property
    def patch_channels(self) -> int:
        """Values of one image token: 2x2 latent cells."""
        return PATCH * PATCH * self.in_channels

    @property
    def visits(self) -> int:
        """Blocks on the tape: the noise refiner's and the joint layers."""
        return self.n_refiner_layers + self.n_layers

    @property
    def caption_limit(self) -> int:
        """Most tokens of a caption: ``floor((axes_lens[0] - 2) / 32) * 32``.

        Padded caption tokens take the frame positions 1 to L, the image L + 1, and the last position is
        ``axes_lens[0] - 1``.
        """
        return (self.axes_lens[0] - 2) // PADDING * PADDING

    @property
    def most_rows(self) -> int:
        """Most rows of image tokens."""
        return self.axes_lens[1]

    @property
    def most_columns(self) -> int:
        """Most columns of image tokens."""
        return self.axes_lens[2]


def padded(tokens: int) -> int:
    """The least multiple of 32 that is not below ``tokens``."""
    return -(-tokens // PADDING) * PADDING


def _check_fixed(config: Mapping[str, Any]) -> None:
    for key, value in _FIXED.items():
        found = config[key]
        if (list(found) if isinstance(found, tuple) else found) != value:
            raise CheckpointError(f"transformer config must have {key}={value}, got {found!r:.80}")
    if config.get("siglip_feat_dim") is not None:
        raise CheckpointError(
            f"transformer config must have siglip_feat_dim=null, got {config['siglip_feat_dim']!r:.80} "
            "(Z-Image-Omni is not supported)"
        )
    heads = config.get("n_kv_heads", config["n_heads"])
    if heads != config["n_heads"]:
        raise CheckpointError(f"transformer config must have n_kv_heads={config['n_heads']} (n_heads), got {heads}")
