"""Qwen3 as the text encoder of Z-Image: the raw output of the last layer but one, for every token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, RequestError
from ..encoder.language import LanguageModel, Segment
from ..encoder.prompt import PromptEncoder, common_length, distinct
from ..stack import NO_KERNELS, BlockStack, Hold, open_tape
from ..stack.pack import Progress

if TYPE_CHECKING:
    from PIL import Image

    from ...loaders.checkpoint import Checkpoint
    from ...loaders.source import ModelSource

TEMPLATE = "z-image"
MAX_TOKENS = 512
"""Longest chat that the model is used with; longer prompts are refused, never cut."""

HIDDEN_LAYER = -2


def chat_text(prompt: str) -> str:
    """One user message and the beginning of the answer; without a think block, which is what thinking on means here."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def qwen3_stack(
    config: Any, checkpoint: Checkpoint, weight_format: str, dtype: torch.dtype, kernels: Mapping[str, str] = NO_KERNELS
) -> BlockStack:
    """The decoder layers that are used: all but the last. ``config`` is transformers' ``Qwen3Config``."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    with torch.device("meta"):
        layer = Qwen3DecoderLayer(config, layer_idx=0)
    return BlockStack(
        checkpoint,
        "language_model.layers.",
        config.num_hidden_layers + 1 + HIDDEN_LAYER,
        layer,
        weight_format=weight_format,
        dtype=dtype,
        kernels=kernels,
    )


class Qwen3Layers(LanguageModel):
    """All decoder layers but the last, without the final norm: ``hidden_states[-2]``.

    Args:
        config: transformers' ``Qwen3Config`` with the attention implementation set.
        checkpoint: the text encoder's tensors.
        device: where the layers run.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the layers.
        cache: folder of packed files.
        progress: called while the layers are packed.
    """

    def __init__(
        self,
        config: Any,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        hold: Hold,
        cache: Path | None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        self._dtype, self._device = dtype, device
        self._norm = torch.nn.Identity()
        rotary = Qwen3RotaryEmbedding(config).to(device)
        self._rotary = lambda hidden, positions: rotary(hidden, positions[0])
        stack = qwen3_stack(config, checkpoint, hold.weight_format, dtype, hold.kernels)
        self._layer = stack.template
        self.tape = open_tape(stack, hold, device, cache, progress)


class ZImageEncoder(PromptEncoder):
    """Qwen3 as the text encoder of Z-Image, with the interface of :class:`PromptEncoder`.

    Every token is kept, the template's too. The last layer, the final norm, the language head and the embedding table
    are never loaded. The prompt and the negative prompt go through each layer together; their common beginning is
    computed once.

    Args:
        source: the opened model.
        device: where the encoder runs.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the decoder layers; None keeps them as stored on the device.
        cache: folder of packed files.
        max_tokens: longest chat.
        progress: called while the layers are packed.
    """

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        hold: Hold | None = None,
        cache: Path | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: Progress = lambda done, total: None,
    ) -> None:
        super().__init__(source, device, dtype, hold=hold, cache=cache, progress=progress)
        self._max_tokens = max_tokens

    def stack(self, weight_format: str) -> BlockStack:
        """The decoder layers that are used, in a weight format; reads no weight."""
        return qwen3_stack(self._config, self._source.text_encoder.checkpoint, weight_format, self._dtype)

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Image.Image] = (),
        template: str = TEMPLATE,
        *,
        check: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        """Prompt embeddings of each prompt.

        Args:
            prompts: at least one; the negative prompt is one of them.
            pictures: none; the text encoder does not see.
            template: ``z-image``.
            check: called before each layer; may raise to stop.

        Returns:
            one tensor [T, D] per prompt on the encoder's device.

        Raises:
            RequestError: a prompt is too long, pictures are given, or another template is asked.
            CheckpointError: tokenizer or weights are missing or of another kind.
        """
        rows = [self.tokens(prompt, pictures, template) for prompt in prompts]
        unique = [rows[place] for place in distinct(rows)]
        common, *endings = self._shared(unique)

        def on_layer(_: int) -> None:
            self.counters.layer_visits += 1
            if check is not None:
                check()

        found = self._language_model().run(common, endings, 0, on_layer)
        return [next(embeds for known, embeds in zip(unique, found, strict=True) if known.equal(row)) for row in rows]

    def tokens(self, prompt: str, pictures: Sequence[Image.Image] = (), template: str = TEMPLATE) -> torch.Tensor:
        """Token ids of the whole chat: int64 [T].

        Raises:
            RequestError: as :meth:`encode`.
        """
        if template != TEMPLATE:
            raise RequestError(f"prompt template of Z-Image must be {TEMPLATE}, got {template!r}")
        if pictures:
            raise RequestError(f"pictures of the {TEMPLATE} template must be 0, got {len(pictures)}")
        found = torch.tensor(self._tokenizer(chat_text(prompt))["input_ids"], dtype=torch.int64)
        if len(found) > self._max_tokens:
            raise RequestError(
                f"prompt must be at most {self._max_tokens} tokens with its template, got {len(found)}",
                hint="shorten the prompt",
            )
        return found

    def _shared(self, rows: Sequence[torch.Tensor]) -> list[Segment]:
        """The common beginning of different token rows and their endings; one row is a beginning without endings."""
        if len(rows) == 1:
            return [self._rows(rows[0], 0)]
        split = common_length(rows)
        return [self._rows(rows[0][:split], 0), *(self._rows(row[split:], split) for row in rows)]

    def _rows(self, tokens: torch.Tensor, start: int) -> Segment:
        """Embed tokens: rows of the stored table, gathered on the host."""
        hidden = self._source.text_encoder.checkpoint.rows("language_model.embed_tokens.weight", tokens)
        self.counters.embedded_rows += len(tokens)
        positions = torch.arange(start, start + len(tokens))[None]
        return Segment(hidden.to(self._device, self._dtype), positions)

    def _language_model(self) -> LanguageModel:
        if self._language is None:
            self._language = Qwen3Layers(
                self._config,
                self._source.text_encoder.checkpoint,
                self._device,
                self._dtype,
                self._hold,
                self._cache,
                self._progress,
            )
        return self._language

    @cached_property
    def _config(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Qwen3Config

        stored = copy.deepcopy(dict(self._source.text_encoder.config))
        if stored.get("model_type") != "qwen3":
            raise CheckpointError(f"text encoder must be of type qwen3, got {stored.get('model_type')!r}")
        try:
            config: Any = Qwen3Config.from_dict(stored)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"text encoder must have a valid config.json, got: {error}") from error
        config._attn_implementation = "sdpa"
        if set(config.layer_types) != {"full_attention"}:
            kinds = ", ".join(sorted(set(config.layer_types)))
            raise CheckpointError(f"text encoder layers must be of type full_attention, got {kinds}")
        return config
