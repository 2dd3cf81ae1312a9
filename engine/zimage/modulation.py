"""Scales and gates of every Z-Image block, computed once per timestep.

``adaLN_modulation`` is a linear layer 256 -> 4 * dim that sees only the time embedding: 3.9 M weights a block, 126 M in
all, 2.2 % of a block's slab in bf16 and 4.3 % beside 8-bit weights, where it would have to stay in bf16. Its outputs
for one timestep are 0.98 MB in bf16 (32 blocks of 4 * 3840, and the output's scale), so a run of nine steps trades
252 MB of weights for 8.8 MB, and the rows are computed in float32. The timesteps of Z-Image do not depend on the size
of the picture, so rows are kept in memory for as long as the transformer is and not on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .config import MAX_TIME_CHANNELS, ZImageConfig


class TensorSource(Protocol):
    """What the rows need of a checkpoint."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor by name, on the CPU."""
        ...


class BlockRows(NamedTuple):
    """One block's rows for one timestep, each [dim]: ``1 + scale`` before a layer and ``tanh(gate)`` behind it."""

    attention_scale: torch.Tensor
    attention_gate: torch.Tensor
    ffn_scale: torch.Tensor
    ffn_gate: torch.Tensor


class RowTable:
    """Rows of all blocks for the timesteps of one run.

    Args:
        rows: per timestep, float32 [blocks, 4, dim] and, of the output, [dim].
        dtype: compute dtype that the rows are handed out in.
        device: where they are handed out.
    """

    def __init__(
        self,
        rows: Mapping[float, tuple[torch.Tensor, torch.Tensor]],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._rows = {t: (blocks.to(device, dtype), out.to(device, dtype)) for t, (blocks, out) in rows.items()}

    def block(self, index: int, timestep: float) -> BlockRows:
        """Rows of block ``index`` of the tape: the noise refiner's blocks come first, then the layers."""
        return BlockRows(*self._rows[timestep][0][index])

    def output(self, timestep: float) -> torch.Tensor:
        """``1 + scale`` of the output norm, [dim]."""
        return self._rows[timestep][1]


class AdaptiveRows:
    """Computes rows from a checkpoint, in float32, and remembers them.

    Args:
        checkpoint: the transformer's tensors.
        config: geometry.
        device: where the products are computed.
    """

    def __init__(self, checkpoint: TensorSource, config: ZImageConfig, device: torch.device) -> None:
        self._checkpoint, self._config, self._device = checkpoint, config, device
        self._known: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def table(self, timesteps: Sequence[float], *, dtype: torch.dtype) -> RowTable:
        """The table for ``timesteps``; only rows never seen before are computed.

        Args:
            timesteps: model times in [0, 1].
            dtype: compute dtype of the rows handed out.
        """
        missing = [timestep for timestep in dict.fromkeys(timesteps) if timestep not in self._known]
        if missing:
            self._compute(missing)
        return RowTable({t: self._known[t] for t in timesteps}, dtype=dtype, device=self._device)

    def _compute(self, timesteps: Sequence[float]) -> None:
        times = torch.tensor(timesteps, dtype=torch.float32, device=self._device)
        hidden = F.silu(self._linear("t_embedder.mlp.0", time_features(times, self._config.t_scale)))
        embedding = self._linear("t_embedder.mlp.2", hidden)
        names = [
            f"{root}.{index}.adaLN_modulation.0"
            for root, count in (("noise_refiner", self._config.n_refiner_layers), ("layers", self._config.n_layers))
            for index in range(count)
        ]
        blocks = torch.stack([self._linear(name, embedding) for name in names], dim=1)
        blocks = blocks.view(len(timesteps), len(names), 4, self._config.dim)
        blocks[:, :, 0::2].add_(1)
        blocks[:, :, 1::2].tanh_()
        output = self._linear("all_final_layer.2-1.adaLN_modulation.1", F.silu(embedding)).add_(1)
        for place, timestep in enumerate(timesteps):
            self._known[timestep] = blocks[place].cpu(), output[place].cpu()

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Float32 ``inputs @ W^T + b``, one row at a time: a row's bits must not depend on its neighbours."""
        weight = self._checkpoint.read(f"{name}.weight").to(self._device).float()
        bias = self._checkpoint.read(f"{name}.bias").to(self._device).float()
        return torch.stack([torch.mv(weight, row).add_(bias) for row in inputs])


def time_features(times: torch.Tensor, scale: float) -> torch.Tensor:
    """``[cos(s t f), sin(s t f)]`` with ``f_j = 10000^(-j/128)``: float32 [n] to [n, 256].

    Args:
        times: model times in [0, 1], float32 [n].
        scale: ``t_scale`` of the config, 1000.
    """
    half = MAX_TIME_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = (times * scale)[:, None] * torch.exp(-math.log(10_000) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
