"""Cache files that trainers read: latents of pictures and controls, embeddings of captions, one file per picture.

Source: kohya-ss/musubi-tuner, names and layout as read by its datasets: ``NAME_WWWWxHHHH_qi.safetensors`` (``qie`` for
edit models; the picture's own size) with ``latents_1xhxw_DTYPE`` and ``latents_control_K_1xhxw_DTYPE``, each
[z, 1, h, w] and normalised, and ``NAME_qi_te.safetensors`` with ``varlen_vl_embed_DTYPE`` [tokens, width]. We keep the
dtype of the encoders and add a hash of the content to the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from ...errors import Cancelled, CheckpointError, DeviceError, InputError, OutputError, QEngineError
from ...loaders.variant import ZIMAGE
from ..files import write_tensors
from ..picture import Picture, load_picture
from ..request import EditRequest, GenerateRequest
from .config import Dataset
from .items import Item
from .sizes import Size, bucket, control_size, fit

if TYPE_CHECKING:
    import torch

    from ..session import Engine
    from .alone import VaeAlone

Kind = Literal["latents", "text"]

VERSION = "1"
_ARCHITECTURE = "qwen_image"
_FORMAT = "1.0.1"
_KEY = "qengine"


@dataclass(frozen=True)
class Cache:
    """What became of one picture.

    Attributes:
        item: of the dataset.
        state: ``made``, ``kept`` or ``failed``.
        path: of the cache file; None where it failed.
        error: why it failed, or None.
    """

    item: Item
    state: Literal["made", "kept", "failed"]
    path: Path | None = None
    error: QEngineError | None = None


@dataclass(frozen=True)
class Maker:
    """Makes the cache files of a dataset with an engine.

    Attributes:
        engine: opened; a VAE is enough for latents.
        kind: ``latents`` or ``text``.
        dataset: where they go and at which sizes.
        keep: keep every file that is there, of whatever content.
        surroundings: what else decides the numbers: weight formats and the like.

    Raises:
        CheckpointError: the model is not of the Qwen-Image family, so that no trainer reads such caches of it.
    """

    engine: Engine | VaeAlone
    kind: Kind
    dataset: Dataset
    keep: bool = False
    surroundings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        variant = self.engine.source.variant
        if variant in ZIMAGE:
            raise CheckpointError(
                f"model must be of the Qwen-Image family to cache a dataset, got {variant}", hint="--model qwen-image"
            )

    @property
    def edits(self) -> bool:
        """Whether the model looks at pictures."""
        return self.engine.defaults.max_references != 0

    @property
    def architecture(self) -> str:
        """Of the file names."""
        return "qie" if self.edits else "qi"

    def make(self, item: Item) -> Cache:
        """One picture.

        Raises:
            InputError: a picture or caption cannot be used.
            QEngineError: as ``Engine.latents`` and ``Engine.encode``.
        """
        if item.error is not None:
            raise item.error
        path, content, encode = self._latents(item) if self.kind == "latents" else self._text(item)
        header = {"architecture": _ARCHITECTURE, "format_version": _FORMAT, **content}
        if path.is_file() and (self.keep or _hash_in(path) == content[_KEY]):
            return Cache(item, "kept", path)
        write_tensors(path, encode(), header)
        return Cache(item, "made", path)

    def _latents(self, item: Item) -> tuple[Path, dict[str, str], Callable[[], dict[str, torch.Tensor]]]:
        picture = load_picture(item.path)
        width, height = picture.image.size
        controls = [load_picture(path) for path in item.controls]
        target = bucket(picture.image.size, self.dataset)
        sizes = [target, *(control_size(control.image.size, target, self.dataset) for control in controls)]
        pictures = [picture, *controls]
        path = self._path(item, f"{width:04d}x{height:04d}_{self.architecture}")
        key = self._key([[each.sha256, size] for each, size in zip(pictures, sizes, strict=True)])

        def encode() -> dict[str, torch.Tensor]:
            made = [self._encode(each, size) for each, size in zip(pictures, sizes, strict=True)]
            return {_named(number, latents): latents for number, latents in enumerate(made)}

        return path, {"width": str(width), "height": str(height), _KEY: key}, encode

    def _encode(self, picture: Picture, size: Size) -> torch.Tensor:
        return self.engine.latents(fit(picture.image, size))[0]

    def _text(self, item: Item) -> tuple[Path, dict[str, str], Callable[[], dict[str, torch.Tensor]]]:
        if item.caption is None:
            raise InputError(f"{item.path} must have a caption, got none", hint='caption_extension = ".txt"')
        if not item.caption:
            raise InputError(f"{item.path} must have a caption that says something, got an empty one")
        caption = item.caption
        controls = [load_picture(path) for path in item.controls] if self.edits else []
        if self.edits and not controls:
            raise InputError(
                f"{item.path} must have a control for an edit model, got none", hint="control_directory, or qwen-image"
            )
        key = self._key([caption, *(control.sha256 for control in controls)])

        def encode() -> dict[str, torch.Tensor]:
            embeds = self.engine.encode(self._request(caption, controls)).conditioning.prompt_embeds
            return {f"varlen_vl_embed_{_dtype(embeds)}": embeds}

        return self._path(item, f"{self.architecture}_te"), {"caption1": caption, _KEY: key}, encode

    def _request(self, caption: str, controls: list[Picture]) -> GenerateRequest:
        common: dict[str, Any] = {"prompt": caption, "true_cfg_scale": 1.0}
        if not controls:
            return GenerateRequest(**common)
        return EditRequest(images=tuple(control.image for control in controls), **common)

    def _path(self, item: Item, ending: str) -> Path:
        return self.dataset.cache_directory / f"{item.path.stem}_{ending}.safetensors"

    def _key(self, content: list[Any]) -> str:
        model = {"model": self.engine.source.fingerprint, "dtype": str(self.engine.dtype), **self.surroundings}
        text = json.dumps([VERSION, self.kind, model, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def cache_items(maker: Maker, items: Iterable[Item]) -> Iterator[Cache]:
    """Make the files one after another; what fails, fails alone.

    Yields:
        One per item, in order.

    Raises:
        Cancelled: the engine was cancelled.
        OutputError: the caches cannot be written.
        CheckpointError: the model cannot be read.
        DeviceError: the device is gone.
    """
    for item in items:
        try:
            yield maker.make(item)
        except (Cancelled, OutputError, CheckpointError, DeviceError):
            raise
        except QEngineError as error:
            yield Cache(item, "failed", error=error)


def stale_files(maker: Maker, made: Iterable[Cache]) -> list[Path]:
    """Cache files of ours for which the dataset has no picture any more, or one of another size.

    Args:
        maker: of the files.
        made: all pictures of the dataset.
    """
    ending = f"_{maker.architecture}" + ("_te" if maker.kind == "text" else "")
    paths = {cache.path for cache in made if cache.path is not None}
    failed = tuple(f"{cache.item.path.stem}_" for cache in made if cache.path is None)
    there = sorted(maker.dataset.cache_directory.glob(f"*{ending}.safetensors"))
    strange = [path for path in there if path not in paths and not path.name.startswith(failed)]
    return [path for path in strange if _hash_in(path) is not None]


def _named(number: int, latents: torch.Tensor) -> str:
    frames, height, width = latents.shape[-3:]
    what = "latents" if number == 0 else f"latents_control_{number - 1}"
    return f"{what}_{frames}x{height}x{width}_{_dtype(latents)}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hash_in(path: Path) -> str | None:
    """The content's hash that a cache file of ours carries; None of another's, or of a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError):
        return None
