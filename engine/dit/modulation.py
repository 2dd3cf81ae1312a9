"""The modulation table: every adaptive-norm row of a timestep, computed once.

``img_mod``, ``txt_mod`` and ``norm_out`` of Qwen-Image are linear layers of ``SiLU(time embedding)``. They are one
third of the weights and see nothing but the timestep, so their outputs for all steps of a run fit in a few megabytes.
The rows are computed in float32 from the stored weights, one block at a time, and kept on disk per timestep; afterwards
neither memory nor the weight stream ever holds those weights.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from ..files import recall, write_tensors
from .block import BlockRows

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of every cache key; raised when the rows' arithmetic changes."""

TIME_CHANNELS = 256


class TensorSource(Protocol):
    """What the table needs of a checkpoint."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor by name, on the CPU."""
        ...


def time_features(timestep: torch.Tensor) -> torch.Tensor:
    """``[cos(1000 t f), sin(1000 t f)]`` with ``f_j = 10000^(-j/128)``: float32 [n] to [n, 256].

    Args:
        timestep: sigma-like time in [0, 1], float32 [n].
    """
    half = TIME_CHANNELS // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = 1000 * (timestep.float()[:, None] * frequencies[None])
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ModulationTable:
    """Rows of all blocks for the timesteps of one run.

    Args:
        rows: per timestep, float32 [blocks, 2, 6 * dim] (image, text) and [2 * dim] for the output norm.
        dtype: compute dtype that the rows are handed out in.
        device: where they are handed out.
    """

    def __init__(
        self, rows: Mapping[float, Mapping[str, torch.Tensor]], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows = {t: {k: v.to(device, dtype) for k, v in row.items()} for t, row in rows.items()}

    def block(self, index: int, timestep: float, *, zero_cond_t: bool) -> BlockRows:
        """Rows of one block; with ``zero_cond_t`` the reference tokens get the row of timestep zero."""
        image, text = self._rows[timestep]["blocks"][index]
        reference = self._rows[0.0]["blocks"][index, 0] if zero_cond_t else None
        return BlockRows(image, text, reference)

    def output(self, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, shift) of the output norm, each [dim]."""
        scale, shift = self._rows[timestep]["output"].chunk(2)
        return scale, shift


class ModulationRows:
    """Computes rows from a checkpoint and remembers them in a folder.

    Args:
        checkpoint: the transformer's tensors.
        num_layers: number of blocks.
        identity: identity of the weights; part of the cache key.
        device: where the products are computed; its kind is part of the key, since float32 sums differ between kinds.
        cache: folder of cached rows, or None to keep none.
    """

    def __init__(
        self,
        checkpoint: TensorSource,
        num_layers: int,
        identity: str,
        *,
        device: torch.device,
        cache: Path | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._num_layers = num_layers
        self._device = device
        key = hashlib.sha256(f"{identity}|{device.type}|{VERSION}".encode()).hexdigest()[:32]
        self._folder = None if cache is None else cache / "modulation" / key
        self._rows: dict[float, dict[str, torch.Tensor]] = {}

    def table(self, timesteps: Sequence[float], *, dtype: torch.dtype) -> ModulationTable:
        """The table for ``timesteps``; only rows never seen before are computed.

        Args:
            timesteps: model times in [0, 1] as the network receives them (already rounded to the compute dtype).
            dtype: compute dtype of the rows handed out.
        """
        missing = []
        for timestep in dict.fromkeys(timesteps):
            if timestep not in self._rows:
                stored = self._recall(timestep)
                if stored is None:
                    missing.append(timestep)
                else:
                    self._rows[timestep] = stored
        if missing:
            self._compute(missing)
        return ModulationTable({t: self._rows[t] for t in timesteps}, dtype=dtype, device=self._device)

    def _path(self, timestep: float) -> Path | None:
        return None if self._folder is None else self._folder / f"{timestep.hex()}.safetensors"

    def _recall(self, timestep: float) -> dict[str, torch.Tensor] | None:
        path = self._path(timestep)
        stored = None if path is None else recall(path)
        if stored is None:
            return None
        if stored.keys() != {"blocks", "output"} or len(stored["blocks"]) != self._num_layers:
            logger.warning("cached modulation rows %s have another form; computing them again", path)
            return None
        return stored

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Float32 ``inputs @ W^T + b``, one row at a time: a row's bits must not depend on its neighbours."""
        weight = self._checkpoint.read(f"{name}.weight").to(self._device).float()
        bias = self._checkpoint.read(f"{name}.bias").to(self._device).float()
        return torch.stack([torch.mv(weight, row).add_(bias) for row in inputs])

    def _compute(self, timesteps: Sequence[float]) -> None:
        features = time_features(torch.tensor(timesteps, dtype=torch.float32, device=self._device))
        hidden = F.silu(self._linear("time_text_embed.timestep_embedder.linear_1", features))
        embedding = F.silu(self._linear("time_text_embed.timestep_embedder.linear_2", hidden))
        blocks = [
            torch.stack(
                [self._linear(f"transformer_blocks.{i}.{stream}_mod.1", embedding) for stream in ("img", "txt")], dim=1
            )
            for i in range(self._num_layers)
        ]
        output = self._linear("norm_out.linear", embedding)
        for n, timestep in enumerate(timesteps):
            row = {"blocks": torch.stack([block[n] for block in blocks]).cpu(), "output": output[n].cpu()}
            self._rows[timestep] = row
            path = self._path(timestep)
            if path is not None:
                write_tensors(path, row)
