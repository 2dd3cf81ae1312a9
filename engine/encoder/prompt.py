"""From prompts and pictures to prompt embeddings."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, RequestError
from ..stack import BlockStack, Hold
from ..stack.pack import Progress
from .language import LanguageModel, Segment, decoder_stack
from .pictures import Patches, cut_patches
from .positions import mrope_positions
from .templates import IMAGE_TOKEN, MAX_PROMPT_TOKENS, PromptTemplate, prompt_template
from .vision import VisionTower

if TYPE_CHECKING:
    from PIL import Image

    from ...loaders.source import ModelSource
    from ..mover import Tape

CODE_VERSION = 1
"""Goes into every cache key; to be raised with any change after which the same prompt gives other bits."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json")


@dataclass
class Counters:
    """What the encoder did since it was opened.

    Attributes:
        vision_runs: passes of the vision tower.
        embedded_rows: tokens that went through the decoder layers.
        layer_visits: decoder layers bound and run.
    """

    vision_runs: int = 0
    embedded_rows: int = 0
    layer_visits: int = 0


class PromptEncoder:
    """Qwen2.5-VL as the text encoder of Qwen-Image and Qwen-Image-Edit.

    Opening reads no weight; the language model and the vision tower are read when first needed and stay until
    :meth:`release`. The embedding table and the language head are never loaded.

    Args:
        source: the opened model.
        device: where the encoder runs.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the decoder layers; None keeps them as stored on the device.
        cache: folder of packed files.
        alone: the vision tower is freed before the decoder layers are read.
        progress: called while the layers are packed.

    Attributes:
        counters: what was done, for tests and benchmarks.
    """

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        hold: Hold | None = None,
        cache: Path | None = None,
        alone: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._source, self._device, self._dtype = source, device, dtype
        self._hold, self._cache, self._alone, self._progress = hold or Hold(), cache, alone, progress
        self._language: LanguageModel | None = None
        self._vision: VisionTower | None = None
        self.counters = Counters()

    def release(self) -> None:
        """Free all weights; the next :meth:`encode` reads them again."""
        self._release_vision()
        if self._language is not None:
            self._language.tape.close()
        self._language = None

    def _release_vision(self) -> None:
        if self._vision is not None:
            self._vision.close()
        self._vision = None

    @property
    def loaded(self) -> bool:
        """Some weights are held."""
        return self._language is not None or self._vision is not None

    @property
    def tape(self) -> Tape | None:
        """The decoder layers, if they are loaded."""
        return None if self._language is None else self._language.tape

    def stack(self, weight_format: str) -> BlockStack:
        """The decoder layers of the checkpoint in a weight format; reads no weight."""
        checkpoint = self._source.text_encoder.checkpoint
        return decoder_stack(self._config.text_config, checkpoint, weight_format, self._dtype)

    def key(self, prompts: Sequence[str], pictures: Sequence[Image.Image], template: str) -> str:
        """Content address of what :meth:`encode` would return; needs neither weights nor tokenizer.

        SHA-256 over the prompts, the pictures' pixels, the template, the files of encoder, tokenizer and processor, the
        kind of device, the dtype and the versions of the code that computes.
        """
        content = {
            "encoder": self._identity,
            "pictures": [_picture_digest(picture) for picture in pictures],
            "prompts": list(prompts),
            "template": template,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _identity(self) -> Mapping[str, Any]:
        component = self._source.text_encoder
        return {
            "code": [CODE_VERSION, torch.__version__, version("transformers")],
            "config": dict(component.config),
            "device": _device_kind(self._device),
            "dtype": str(self._dtype),
            "processor": dict(self._source.processor_config),
            "tokenizer": self._tokenizer_digest(),
            "weights": component.checkpoint.identity,
            "weight_format": self._hold.weight_format,
            "kernels": dict(self._hold.kernels),
        }

    def _tokenizer_digest(self) -> str:
        digest = hashlib.sha256()
        for name in _TOKENIZER_FILES:
            file = self._source.tokenizer_dir / name
            if file.is_file():
                digest.update(name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Image.Image],
        template: str,
        *,
        check: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        """Prompt embeddings of each prompt, all with the same pictures.

        The vision tower and the tokens that all prompts begin with run once.

        Args:
            prompts: at least one; the negative prompt is one of them.
            pictures: condition pictures, already at the size at which the model should see them.
            template: ``text``, ``edit`` or ``edit-plus``.
            check: called before the vision tower and before each layer; may raise to stop.

        Returns:
            one tensor [T, D] per prompt on the encoder's device, without the template's first tokens.

        Raises:
            RequestError: a prompt is longer than 1024 tokens, or pictures do not fit the template.
            InputError: a picture cannot be cut into patches.
            CheckpointError: tokenizer, processor or weights are missing or of another kind.
        """
        chat = prompt_template(template)
        texts = [chat.text(prompt, len(pictures)) for prompt in prompts]
        patches = cut_patches(pictures, self._source.processor_config) if pictures else None
        tokens = [self._tokens(text, patches, chat) for text in texts]
        check = check or _proceed
        check()
        features = self._features(patches)
        unique = distinct(tokens)
        common, *endings = self._segments([tokens[place] for place in unique], patches, features)

        def on_layer(_: int) -> None:
            self.counters.layer_visits += 1
            check()

        found = self._language_model().run(common, endings, chat.drop_tokens, on_layer)
        return [found[next(i for i, place in enumerate(unique) if torch.equal(tokens[place], row))] for row in tokens]

    def tokens(self, prompt: str, pictures: Sequence[Image.Image], template: str) -> torch.Tensor:
        """Token ids of the whole chat, image tokens included: int64 [T]."""
        chat = prompt_template(template)
        text = chat.text(prompt, len(pictures))
        return self._tokens(text, cut_patches(pictures, self._source.processor_config) if pictures else None, chat)

    def _tokens(self, text: str, patches: Patches | None, chat: PromptTemplate) -> torch.Tensor:
        short = torch.tensor(self._tokenizer(text)["input_ids"], dtype=torch.int64)
        length = len(short) - chat.drop_tokens
        if length > MAX_PROMPT_TOKENS:
            raise RequestError(
                f"prompt must be at most {MAX_PROMPT_TOKENS} tokens with the end of its template, got {length}",
                hint="shorten the prompt",
            )
        counts = torch.ones_like(short)
        if patches is not None:
            counts[short == self._image_token] = torch.tensor(patches.token_counts)
        return short.repeat_interleave(counts)

    def _segments(self, rows: Sequence[torch.Tensor], patches: Patches | None, features: torch.Tensor) -> list[Segment]:
        """The common beginning of different token rows and their endings; one row is a beginning without endings."""
        grids = patches.merged_grids if patches is not None else ()
        positions = [mrope_positions(row, self._image_token, grids) for row in rows]
        split = common_length(rows) if len(rows) > 1 else len(rows[0])
        common = self._segment(rows[0][:split], positions[0][:, :split], features)
        if len(rows) == 1:
            return [common]
        rest = features[int((rows[0][:split] == self._image_token).sum()) :]
        pairs = zip(rows, positions, strict=True)
        return [common, *(self._segment(row[split:], place[:, split:], rest) for row, place in pairs)]

    def _features(self, patches: Patches | None) -> torch.Tensor:
        """Rows for all image tokens [n, D]; none without pictures."""
        if patches is None:
            return torch.empty(0, self._config.text_config.hidden_size, dtype=self._dtype, device=self._device)
        if self._vision is None:
            config, checkpoint = self._config.vision_config, self._source.text_encoder.checkpoint
            self._vision = VisionTower(config, checkpoint, self._device, self._dtype)
        self.counters.vision_runs += 1
        rows = self._vision.run(patches)
        if self._alone:
            self._release_vision()
        return rows

    def _segment(self, tokens: torch.Tensor, positions: torch.Tensor, features: torch.Tensor) -> Segment:
        """Embed tokens: rows of the stored table, gathered on the host, with image features in their places."""
        rows = self._source.text_encoder.checkpoint.rows("language_model.embed_tokens.weight", tokens)
        hidden = rows.to(self._device, self._dtype)
        is_image = (tokens == self._image_token).to(self._device)
        hidden[is_image] = features[: int(is_image.sum())].to(self._dtype)
        self.counters.embedded_rows += len(tokens)
        return Segment(hidden, positions)

    def _language_model(self) -> LanguageModel:
        if self._language is None:
            config, checkpoint = self._config.text_config, self._source.text_encoder.checkpoint
            self._language = LanguageModel(
                config, checkpoint, self._device, self._dtype, self._hold, self._cache, self._progress
            )
        return self._language

    @cached_property
    def _config(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Qwen2_5_VLConfig

        stored = copy.deepcopy(dict(self._source.text_encoder.config))
        if stored.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(f"text encoder must be of type qwen2_5_vl, got {stored.get('model_type')!r}")
        try:
            config: Any = Qwen2_5_VLConfig.from_dict(stored)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"text encoder must have a valid config.json, got: {error}") from error
        config._attn_implementation = "sdpa"
        kinds = set(config.text_config.layer_types)
        if kinds != {"full_attention"}:
            raise CheckpointError(f"text encoder layers must be of type full_attention, got {', '.join(sorted(kinds))}")
        return config

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        folder = self._source.tokenizer_dir
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder} must hold a Qwen2 tokenizer, got none: {error}") from error

    @cached_property
    def _image_token(self) -> int:
        token = self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if token != self._config.image_token_id:
            raise CheckpointError(
                f"{IMAGE_TOKEN} of the tokenizer must be token {self._config.image_token_id} as in the text encoder's "
                f"config, got {token}"
            )
        return token


def _proceed() -> None:
    pass


def distinct(rows: Sequence[torch.Tensor]) -> list[int]:
    """Places of the first of each kind of equal rows."""
    places: list[int] = []
    for place, row in enumerate(rows):
        if not any(torch.equal(rows[known], row) for known in places):
            places.append(place)
    return places


def common_length(rows: Sequence[torch.Tensor]) -> int:
    """How many tokens all rows begin with; at least one token of each is left over."""
    most = min(len(row) for row in rows) - 1
    same = torch.stack([row[:most] == rows[0][:most] for row in rows]).all(dim=0)
    return most if bool(same.all()) else int((~same).int().argmax())


def _picture_digest(picture: Image.Image) -> str:
    pixels = picture.convert("RGB")
    return hashlib.sha256(f"{pixels.width}x{pixels.height}\n".encode() + pixels.tobytes()).hexdigest()


def _device_kind(device: torch.device) -> str:
    """``cpu``, or CUDA with its architecture: bits depend on it."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda sm{major}{minor}"
