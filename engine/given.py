"""What was encoded beforehand, perhaps on another machine, and stands in for the encoders of a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Given:
    """Encoded parts of a request; what is None or empty is encoded by the run itself.

    Attributes:
        prompt_embeds: [T, D] of the prompt, ready for the transformer.
        negative_embeds: [T', D] of the negative prompt.
        references: clean normalised latents [1, z, 1, h, w] of each picture to edit, first to last.
        init: clean normalised latents [1, z, 1, h, w] of the picture to start from, at the size of the output.
        size: (width, height) of the output in pixels; required where there are references or init.

    Raises:
        RequestError: a tensor is of another shape, not finite, or the size is missing.
    """

    prompt_embeds: torch.Tensor | None = None
    negative_embeds: torch.Tensor | None = None
    references: tuple[torch.Tensor, ...] = ()
    init: torch.Tensor | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            dims = 2 if name.endswith("embeds") else 5
            if tensor.dim() != dims or not tensor.numel():
                raise RequestError(f"{name} must have {dims} dimensions and no empty one, got {list(tensor.shape)}")
            if not bool(tensor.isfinite().all()):
                raise RequestError(f"{name} must be finite, got NaN or infinity", hint="extract it again")
        if self.negative_embeds is not None and self.prompt_embeds is None:
            raise RequestError("negative_embeds must come with prompt_embeds, got them alone")
        if (self.references or self.init is not None) and self.size is None:
            raise RequestError("size must be given with latents, got none")

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, in a fixed order; references as ``references.0`` and so on."""
        made = {"prompt_embeds": self.prompt_embeds, "negative_embeds": self.negative_embeds, "init": self.init}
        made |= {f"references.{number}": latents for number, latents in enumerate(self.references)}
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    @cached_property
    def key(self) -> str:
        """SHA-256 over size, names, dtypes, shapes and bytes."""
        import torch

        digest = hashlib.sha256(repr(self.size).encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
