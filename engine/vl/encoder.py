"""From pictures and text to raw hidden states of Qwen3-VL."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...errors import CheckpointError, RequestError
from ...loaders.vl import VLSource
from ..encoder.pictures import Patches, cut_patches
from ..encoder.positions import mrope_positions
from ..encoder.prompt import Counters
from ..picture import Picture as Loaded
from ..picture import load_picture
from ..stack import Hold
from ..stack.pack import Progress
from .language import LanguageModel, Sequenced, entry_of, visible_keys
from .masking import MaskMode, kept_tokens, masked_tokens, without
from .prompt import Chat, expanded
from .raw import MAX_IMAGES, RawExtraction, Seen, segment_rows
from .vision import Features, VisionTower

if TYPE_CHECKING:
    from ..mover import Tape

CODE_VERSION = 1
"""To be raised with any change after which the same picture gives other hidden states."""

Picture = str | PathLike[str] | bytes | Image.Image


class VLEncoder:
    """Qwen3-VL over a tape of layers, without a language head.

    Opening reads no weight. Decoder layers are held up to the deepest one that was asked for, the vision tower from
    the first picture on; both stay until :meth:`release`. The embedding table and the language head are never loaded.

    Args:
        source: the opened model.
        device: where it runs.
        dtype: of computation, and of weights in the format ``bf16``.
        hold: format and place of the decoder layers; None keeps them as stored on the device.
        cache: folder of packed files.
        alone: the vision tower is freed before the decoder layers are read, and they before it.
        progress: called while the layers are packed.

    Attributes:
        source: the opened model.
        counters: what was done, for tests and benchmarks.
    """

    def __init__(
        self,
        source: VLSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        hold: Hold | None = None,
        cache: Path | None = None,
        alone: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.source = source
        self.counters = Counters()
        self._device, self._dtype = device, dtype
        self._hold, self._cache, self._alone, self._progress = hold or Hold(), cache, alone, progress
        self._chat = Chat(source)
        self._language: LanguageModel | None = None
        self._vision: VisionTower | None = None

    @property
    def loaded(self) -> bool:
        """Some weights are held."""
        return self._language is not None or self._vision is not None

    @property
    def tape(self) -> Tape | None:
        """The decoder layers, if they are loaded."""
        return None if self._language is None else self._language.tape

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """What the hidden states depend on besides pictures and text; no path, no time.

        Keys: ``code``, ``config``, ``device``, ``dtype``, ``processor``, ``template``, ``tokenizer``, ``variant``,
        ``weight_format``, ``weights``; hashes are SHA-256.
        """
        component = self.source.component
        return {
            "code": [CODE_VERSION, torch.__version__, version("transformers")],
            "config": _digest(dict(component.config)),
            "device": self._device.type,
            "dtype": str(self._dtype).removeprefix("torch."),
            "processor": _digest(dict(self.source.processor_config)),
            "template": _digest(self.source.chat_template),
            "tokenizer": self._chat.digest,
            "variant": self.source.variant,
            "weight_format": self._hold.weight_format,
            "weights": component.checkpoint.fingerprint,
        }

    def release(self) -> None:
        """Free all weights; the next :meth:`raw` reads them again."""
        self.release_vision()
        self._release_language()

    def _release_language(self) -> None:
        if self._language is not None:
            self._language.tape.close()
        self._language = None

    def release_vision(self) -> None:
        """Free the vision tower; the next picture reads it again."""
        if self._vision is not None:
            self._vision.close()
        self._vision = None

    @torch.no_grad()
    def raw(  # noqa: PLR0913 (the options by name)
        self,
        images: Picture | Sequence[Picture],
        text: str | None = None,
        layers: Sequence[int] = (-6,),
        *,
        system_prompt: str | None = None,
        think_block: bool = False,
        mask_tokens: Sequence[int] = (),
        mask_mode: MaskMode = "attention",
        check: Callable[[], None] | None = None,
    ) -> RawExtraction:
        """Raw hidden states of one or several layers, in one pass that stops at the deepest.

        Args:
            images: a picture, or several: file, bytes or image; an empty list is text alone.
            text: a description that follows the pictures.
            layers: -1 (after the final norm) to minus the model's layers.
            system_prompt: a system message before all.
            think_block: end the chat with an empty think block.
            mask_tokens: image tokens, counted over all pictures, that no other token may see, not even in the tower.
            mask_mode: ``attention`` keeps their rows, ``remove`` leaves them out; the other rows are the same.
            check: called before the vision tower and before each layer; may raise to stop.

        Raises:
            RequestError: an option is out of range.
            InputError: a picture cannot be read or cut.
            CheckpointError: the model is damaged.
        """
        entries = {layer: entry_of(self._layer(layer), self.source.layers) for layer in layers}
        if not entries:
            raise RequestError("layers must be at least one, got none")
        if mask_mode not in ("attention", "remove"):
            raise RequestError(f"mask_mode must be attention or remove, got {mask_mode!r}")
        check = check or _proceed
        pictures = _pictures(images)
        patches = cut_patches([each.image for each in pictures], self.source.processor_config) if pictures else None
        counts = patches.token_counts if patches else ()
        masked = masked_tokens(mask_tokens, sum(counts))
        prompt = self._chat.text(len(counts), text, system_prompt, think_block=think_block)
        ids = self._chat.tokens(prompt, counts)
        check()
        features = self._features(patches, masked)
        kept = kept_tokens(ids == self._chat.ids[1], masked if mask_mode == "remove" else ())
        sequence = self._sequence(ids, patches, features, masked if mask_mode == "attention" else ())
        states = self._run(without(sequence, kept), set(entries.values()), check)
        grids = [(1, *grid) for grid in patches.grids] if patches else []
        return RawExtraction(
            hidden={layer: states[entry].cpu() for layer, entry in entries.items()},
            input_ids=ids[kept].to(torch.int32),
            segments=segment_rows(ids, *self._chat.ids)[kept],
            grid_thw=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
            prompt=expanded(prompt, counts),
            text=text,
            system_prompt=system_prompt,
            variant=self.source.variant,
            think_block=think_block,
            pictures=tuple(Seen(each.sha256, each.image.width, each.image.height) for each in pictures),
            masked=tuple(sorted(masked)),
        )

    def _layer(self, layer: int) -> int:
        if not isinstance(layer, int) or isinstance(layer, bool) or not -self.source.layers <= layer <= -1:
            raise RequestError(f"hidden_layer must be -1 to -{self.source.layers}, got {layer!r}")
        return layer

    def _features(self, patches: Patches | None, masked: Collection[int]) -> Features:
        if patches is None:
            return Features(torch.empty(0, self.source.hidden_size, dtype=self._dtype, device=self._device))
        if self._vision is None:
            if self._alone:
                self._release_language()
            config, checkpoint = self._config.vision_config, self.source.component.checkpoint
            self._vision = VisionTower(config, checkpoint, self._device, self._dtype)
        self.counters.vision_runs += 1
        features = self._vision.run(patches, masked)
        if self._alone:
            self.release_vision()
        return features

    def _sequence(
        self, ids: torch.Tensor, patches: Patches | None, features: Features, hidden: Collection[int]
    ) -> Sequenced:
        """Embed tokens: rows of the stored table, gathered on the host, with image features in their places."""
        rows = self.source.component.checkpoint.rows("language_model.embed_tokens.weight", ids)
        embedded = rows.to(self._device, self._dtype)
        places = (ids == self._chat.ids[1]).nonzero().flatten()
        embedded[places.to(self._device)] = features.tokens.to(self._dtype)
        positions = mrope_positions(ids, self._chat.ids[1], patches.merged_grids if patches else ())
        visible = visible_keys(len(ids), [int(places[token]) for token in sorted(hidden)], self._device)
        return Sequenced(embedded, positions, places.to(self._device), features.deepstack, visible)

    def _run(self, sequence: Sequenced, entries: set[int], check: Callable[[], None]) -> dict[int, torch.Tensor]:
        def on_layer(_: int) -> None:
            check()
            self.counters.layer_visits += 1

        self.counters.embedded_rows += len(sequence.hidden)
        return self._language_model(max(entries)).run(sequence, entries, on_layer)

    def _language_model(self, depth: int) -> LanguageModel:
        if self._language is not None and len(self._language.tape) < depth:
            self._release_language()
        if self._language is None:
            config, checkpoint = self._config.text_config, self.source.component.checkpoint
            self._language = LanguageModel(
                config, checkpoint, self._device, self._dtype, self._hold, depth, self._cache, self._progress
            )
        return self._language

    @cached_property
    def _config(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import Qwen3VLConfig

        stored = copy.deepcopy(dict(self.source.component.config))
        try:
            config: Any = Qwen3VLConfig.from_dict(stored)
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"Qwen3-VL must have a valid config.json, got: {error}") from error
        config._attn_implementation = "sdpa"
        return config


def _pictures(images: Picture | Sequence[Picture]) -> list[Loaded]:
    single = isinstance(images, (str, bytes, PathLike, Image.Image))
    given: Sequence[Any] = [images] if single else list(images)
    if len(given) > MAX_IMAGES:
        raise RequestError(f"pictures must be at most {MAX_IMAGES}, got {len(given)}")
    return [load_picture(picture) for picture in given]


def _proceed() -> None:
    pass


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
