"""What the transformer does with a caption before the first step: embed, pad, refine. It never sees the timestep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import nn

from ...errors import RequestError
from ...loaders.checkpoint import Checkpoint
from ..dit.kernels import DEFINITIONS, SAFE, Kernels
from ..mover import Placement, Tape
from ..stack import BlockStack, CheckpointSource
from .block import Scale, ZImageBlock
from .config import ZImageConfig, padded
from .rope import caption_rotations


class _CaptionEnds(nn.Module):
    def __init__(self, config: ZImageConfig) -> None:
        super().__init__()
        self.cap_embedder = nn.Sequential(
            Scale(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))


class CaptionRefiner:
    """Prompt embeddings to caption tokens: cap_embedder, pads up to a multiple of 32, the context refiner's blocks.

    None of it depends on the timestep, so it runs once per prompt. Its weights (364 M of Z-Image's 6155 M) are read
    when a new prompt comes, one block at a time on the device, and freed at once; the tokens of the latest prompts are
    kept.

    Args:
        checkpoint: the transformer's tensors.
        config: geometry.
        device: where it runs.
        dtype: of weights and computation.
        kernels: implementations of the blocks' ops.

    Attributes:
        runs: how often the weights were read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ZImageConfig,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels = DEFINITIONS,
    ) -> None:
        self._checkpoint, self._config, self._device, self._dtype = checkpoint, config, device, dtype
        self._kernels = kernels
        self._known: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.runs = 0

    def run(self, prompts: Sequence[torch.Tensor], *, safe: bool = False) -> list[torch.Tensor]:
        """Caption tokens of each prompt.

        Args:
            prompts: prompt embeddings, [tokens, cap_feat_dim] each.
            safe: every op runs as it is defined, and the result is not kept.

        Returns:
            One tensor [1, padded tokens, dim] per prompt.

        Raises:
            RequestError: a caption is empty, longer than the model has positions for, or of another width.
        """
        for prompt in prompts:
            _check(prompt, self._config)
        if safe:
            return self._refine(prompts, SAFE)
        if any(self._recall(prompt) is None for prompt in prompts):
            self._known = list(
                zip([prompt.cpu() for prompt in prompts], self._refine(prompts, self._kernels), strict=True)
            )
        return [caption for caption in map(self._recall, prompts) if caption is not None]

    def _recall(self, prompt: torch.Tensor) -> torch.Tensor | None:
        # Embeddings come from the encoder's device, from a cache or from a file; the same ones may lie anywhere.
        for known, caption in self._known:
            if known.shape == prompt.shape and known.dtype == prompt.dtype and torch.equal(known, prompt.cpu()):
                return caption
        return None

    def _refine(self, prompts: Sequence[torch.Tensor], kernels: Kernels) -> list[torch.Tensor]:
        self.runs += 1
        states = self._embed(prompts)
        rotations = [caption_rotations(len(prompt), self._config).to(self._device) for prompt in prompts]
        with torch.device("meta"):
            block = ZImageBlock(self._config)
        count = self._config.n_refiner_layers
        stack = BlockStack(self._checkpoint, "context_refiner.", count, block, dtype=self._dtype)
        through_one_slot = Placement(count, tuple(range(count)), slots=1, host="disk")
        with (
            Tape(stack.layouts, CheckpointSource(stack), through_one_slot, self._device) as tape,
            closing(tape.sweep(more=False)) as visits,
            stack.template,
        ):
            for _, views in visits:
                bound = stack.template.bind(views)
                states = [
                    bound(state, None, rotation, None, kernels)
                    for state, rotation in zip(states, rotations, strict=True)
                ]
        return states

    def _embed(self, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.device("meta"):
            ends = _CaptionEnds(self._config)
        ends = ends.to(self._dtype).to_empty(device="cpu").requires_grad_(False)
        self._checkpoint.read_into(list(ends.named_parameters()))
        ends = ends.to(self._device)
        embedded = []
        for prompt in prompts:
            tokens = ends.cap_embedder(prompt.to(self._device, self._dtype))
            pads = ends.cap_pad_token.expand(padded(len(prompt)) - len(prompt), -1)
            embedded.append(torch.cat([tokens, pads])[None])
        return embedded


def _check(prompt: torch.Tensor, config: ZImageConfig) -> None:
    if prompt.ndim != 2 or prompt.shape[1] != config.cap_feat_dim:
        raise RequestError(f"prompt_embeds must be of shape [tokens, {config.cap_feat_dim}], got {list(prompt.shape)}")
    if not 1 <= len(prompt) <= config.caption_limit:
        raise RequestError(
            f"caption must be 1 to {config.caption_limit} tokens, got {len(prompt)}", hint="shorten the prompt"
        )
