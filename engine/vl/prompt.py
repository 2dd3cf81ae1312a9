"""The chat that Qwen3-VL reads: pictures first, then a description, by the model's own template."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ...errors import CheckpointError, RequestError
from ...loaders.vl import VLSource

START, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_RESERVED = (START, IMAGE, END, "<|video_pad|>")
_TOKEN_IDS = {"vision_start_token_id": 151652, "image_token_id": 151655, "vision_end_token_id": 151653}
_THOUGHT = "<think>\n\n</think>\n\n"


class Chat:
    """Tokenizer and template of an opened model.

    Args:
        source: the model.
    """

    def __init__(self, source: VLSource) -> None:
        self._source = source

    @cached_property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer of the folder; no code of the folder is run."""
        from transformers import AutoTokenizer

        folder = self._source.folder
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} must hold a Qwen3 tokenizer, got none: {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tokenizer's files."""
        found = hashlib.sha256()
        for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
            file = self._source.folder / name
            if file.is_file():
                found.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return found.hexdigest()

    @cached_property
    def ids(self) -> tuple[int, int, int]:
        """Token ids of vision start, image and vision end.

        Raises:
            CheckpointError: the tokenizer and the config disagree.
        """
        found = tuple(self.tokenizer.convert_tokens_to_ids(token) for token in (START, IMAGE, END))
        config = self._source.component.config
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
        expected = tuple(
            config.get(name, default) for name, default in zip(names, (151652, 151655, 151653), strict=True)
        )
        if found != expected:
            raise CheckpointError(f"vision tokens of the tokenizer must be {expected} as in config.json, got {found}")
        return found  # pyright: ignore[reportReturnType]

    def text(
        self, pictures: int, text: str | None, system_prompt: str | None = None, *, think_block: bool = False
    ) -> str:
        """The chat with one placeholder per picture.

        Args:
            pictures: how many.
            text: the description; None leaves its item out.
            system_prompt: None leaves the system message out.
            think_block: end with an empty think block, which closes the open one of the Thinking variant.

        Raises:
            RequestError: a text holds a vision token, or there is nothing to read.
            CheckpointError: the template cannot be used.
        """
        for word, value in (("text", text), ("system prompt", system_prompt)):
            held = [token for token in _RESERVED if token in (value or "")]
            if held:
                raise RequestError(f"{word} must not hold {held[0]}, which stands for a picture, got one")
        content: list[dict[str, str]] = [{"type": "image"}] * pictures
        content = content if text is None else [*content, {"type": "text", "text": text}]
        if not content:
            raise RequestError("chat must hold a picture or a text, got neither")
        messages: list[dict[str, Any]] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        made = self._render([*messages, {"role": "user", "content": content}])
        if made.count(IMAGE) != pictures:
            raise CheckpointError(f"chat template must place {pictures} pictures, got {made.count(IMAGE)} placeholders")
        if not think_block:
            return made
        return made + (_THOUGHT.removeprefix("<think>\n") if made.endswith("<think>\n") else _THOUGHT)

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._source.chat_template, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise CheckpointError(f"chat template of {self._source.folder} must be usable, got: {error}") from error

    def tokens(self, text: str, counts: Sequence[int]) -> torch.Tensor:
        """Token ids with one image token per row of each picture, int64 [S].

        Args:
            text: of :meth:`text`.
            counts: image rows of each picture.
        """
        short = torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)
        repeats = torch.ones_like(short)
        repeats[short == self.ids[1]] = torch.tensor(list(counts), dtype=torch.int64)
        return short.repeat_interleave(repeats)


def expanded(text: str, counts: Sequence[int]) -> str:
    """The chat with as many placeholders as each picture has rows."""
    pieces = text.split(IMAGE)
    ends = [IMAGE * count + piece for count, piece in zip(counts, pieces[1:], strict=True)]
    return pieces[0] + "".join(ends)
