"""The state of a run between two steps: a value, so that a step can be retried, saved and resumed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from .files import write_tensors

FORMAT = "qengine-run-state"
VERSION = 1


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        key: identity of the run (request, pictures, model, dtype, device kind); only the same run may go on from here.
        next_step: index of the step to do next.
        grid: token rows and columns of the target.
        latent_tokens: float32 [1, rows * columns, 4z].
    """

    key: str
    next_step: int
    grid: tuple[int, int]
    latent_tokens: torch.Tensor

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OutputError: the place cannot be written.
        """
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "state": json.dumps({"key": self.key, "next_step": self.next_step, "grid": self.grid}),
        }
        write_tensors(path, {"latent_tokens": self.latent_tokens}, header)

    @classmethod
    def load(cls, path: str | Path) -> RunState:
        """Read a state written by :meth:`save`.

        Raises:
            InputError: the file is missing, cut or not a run state.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT or header.get("version") != str(VERSION):
                    raise InputError(f"{path} must be a run state of version {VERSION}, got another kind of file")
                state = json.loads(header["state"])
                tokens = file.get_tensor("latent_tokens")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} must be a whole run state, got: {error}") from error
        return cls(state["key"], state["next_step"], (state["grid"][0], state["grid"][1]), tokens)
