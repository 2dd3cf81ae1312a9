"""Where a model comes from: the embedded tiny one, a diffusers folder, a hub id, or three single files.

``open_model`` reads headers and configs only. What can be refused is refused here, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError
from . import component, zimage
from .checkpoint import Checkpoint
from .component import Component
from .document import read_json
from .hub import locate, looks_like_hub_id
from .names import ZERO_COND_MARKER
from .processing import SCHEDULER_DEFAULTS, find_tokenizer, processor_config, require_tokenizer
from .variant import (
    ZIMAGE,
    ZIMAGE_CLASSES,
    Variant,
    folder_variant,
    known_names,
    resolve_known,
    single_variant,
    zimage_variant,
)

TINY = Path(__file__).resolve().parent / "tiny"
_VOLATILE = frozenset(
    {"_diffusers_version", "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
)


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded: its parts, found and checked, none of their weights read.

    Attributes:
        label: the model as the user wrote it: "tiny", a hub id or a path.
        variant: "qwen-image", "qwen-image-edit", "qwen-image-edit-2509" or "qwen-image-edit-2511".
        defaults: key of the engine's table of defaults: the variant, or "tiny".
        transformer: the DiT; its config always has ``zero_cond_t``.
        vae: the image VAE.
        text_encoder: Qwen2.5-VL with the names ``language_model.*``, ``visual.*`` and perhaps ``lm_head.weight``.
        tokenizer_dir: folder with tokenizer.json or vocab.json and merges.txt.
        processor_config: of the image processor, with ``min_pixels`` and ``max_pixels``.
        scheduler_config: of the flow-matching schedule.
        notes: decisions worth saying to the user.
        fingerprint: SHA-256 over headers, samples of the data and configs; no paths, no times.
    """

    label: str
    variant: str
    defaults: str
    transformer: Component
    vae: Component
    text_encoder: Component
    tokenizer_dir: Path
    processor_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    notes: tuple[str, ...]
    fingerprint: str


def open_model(
    model: str | Path | None = None,
    *,
    dit: str | Path | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    model_version: str | None = None,
    offline: bool = False,
) -> ModelSource:
    """Find a model and check its headers and configs.

    Args:
        model: a diffusers folder, a hub id, or a short name ("qwen-image-edit-2511"); None for the embedded tiny model.
        dit: single file of the transformer; with ``vae`` and ``text_encoder``, instead of ``model``.
        vae: single file of the image VAE.
        text_encoder: single file of Qwen2.5-VL.
        tokenizer: tokenizer folder, for single files.
        model_version: "original", "edit", "edit-2509" or "edit-2511", where the files cannot tell.
        offline: never use the network.

    Raises:
        RequestError: some but not all of the three files, both a model and files, or an unknown version.
        CheckpointError: the model is missing, incomplete, altered or of another kind.
    """
    files = {"dit": dit, "vae": vae, "text_encoder": text_encoder}
    given = {name: Path(path) for name, path in files.items() if path is not None}
    if given:
        return _open_files(model, given, tokenizer, model_version)
    if tokenizer is not None:
        raise RequestError("--tokenizer must be given with --dit, --vae and --text-encoder, got none of them")
    if model is None or model == "tiny":
        return _open_folder(TINY, "tiny", model_version)
    return _open_named(model, model_version, offline)


def _open_named(model: str | Path, model_version: str | None, offline: bool) -> ModelSource:
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path, str(model), model_version)
    if path.is_file():
        raise CheckpointError(
            f"model must be a folder or a hub id, got the file {path}",
            hint="give single files with --dit, --vae and --text-encoder",
        )
    hub_id = resolve_known(str(model))
    if hub_id is None and not looks_like_hub_id(str(model)):
        raise CheckpointError(f"model must be an existing folder, got {model}: there is none")
    folder = locate(hub_id or str(model), offline=offline)
    return _open_folder(folder, str(model), model_version, hub_id=hub_id or str(model))


def _open_folder(folder: Path, label: str, model_version: str | None, hub_id: str = "") -> ModelSource:
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{folder} must be a diffusers folder, got none: it has no model_index.json",
            hint="give single files with --dit, --vae and --text-encoder",
        )
    document = read_json(index)
    room = zimage if document.get("_class_name") in ZIMAGE_CLASSES else component
    transformer = room.open_transformer(folder / "transformer")
    marked = _marked(transformer.checkpoint)
    names = (folder.name, label, hub_id, str(document.get("_name_or_path", "")))
    variant = folder_variant(document, transformer.config, marked=marked, names=names, model_version=model_version)
    tokenizer_dir = require_tokenizer(folder / "tokenizer")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return _assemble(
        label=label,
        variant=variant,
        defaults=str(document.get("_qengine_defaults", variant.name)),
        parts=(transformer, room.open_vae(folder / "vae"), room.open_text_encoder(folder / "text_encoder")),
        tokenizer_dir=tokenizer_dir,
        processor={} if room is zimage else processor_config(folder),
        scheduler=read_json(scheduler),
    )


def _open_files(
    model: str | Path | None, given: Mapping[str, Path], tokenizer: str | Path | None, model_version: str | None
) -> ModelSource:
    missing = [name for name in ("dit", "vae", "text_encoder") if name not in given]
    flags = {name: "--" + name.replace("_", "-") for name in ("dit", "vae", "text_encoder")}
    if missing:
        raise RequestError(
            f"--dit, --vae and --text-encoder must be given together, "
            f"got only {', '.join(flags[name] for name in given)}",
            hint=f"add {' and '.join(flags[name] for name in missing)}, or use --model",
        )
    if model is not None:
        raise RequestError(f"the model must be given as --model or as single files, got both (--model {model})")
    paths = {name: path.expanduser() for name, path in given.items()}
    room = zimage if zimage.is_zimage(paths["dit"]) else component
    transformer = room.open_transformer(paths["dit"])
    variant = _single_variant(transformer, paths["dit"].name, model_version, room is zimage)
    tokenizer_dir, note = find_tokenizer(tokenizer, paths["text_encoder"])
    return _assemble(
        label=str(given["dit"]),
        variant=Variant(variant.name, variant.zero_cond_t, (*variant.notes, *note)),
        defaults=variant.name,
        parts=(transformer, room.open_vae(paths["vae"]), room.open_text_encoder(paths["text_encoder"])),
        tokenizer_dir=tokenizer_dir,
        processor={} if room is zimage else processor_config(None),
        scheduler=zimage.SCHEDULER_DEFAULTS if room is zimage else SCHEDULER_DEFAULTS,
    )


def _single_variant(transformer: Component, file_name: str, model_version: str | None, is_zimage: bool) -> Variant:
    if is_zimage:
        return zimage_variant((file_name,), model_version)
    marked = _marked(transformer.checkpoint)
    return single_variant(transformer.config, marked=marked, file_name=file_name, model_version=model_version)


def _assemble(
    *,
    label: str,
    variant: Variant,
    defaults: str,
    parts: tuple[Component, Component, Component],
    tokenizer_dir: Path,
    processor: Mapping[str, Any],
    scheduler: Mapping[str, Any],
) -> ModelSource:
    transformer, vae, text_encoder = parts
    if variant.name in ZIMAGE:
        zimage.check_widths(transformer, vae, text_encoder)
    else:
        config = {**transformer.config, "zero_cond_t": variant.zero_cond_t}
        transformer = Component(transformer.name, config, transformer.checkpoint)
        component.check_widths(transformer, vae, text_encoder)
    digest = hashlib.sha256(b"qengine model 1\n" + variant.name.encode())
    for part in (transformer, vae, text_encoder):
        digest.update(part.checkpoint.fingerprint.encode())
        digest.update(_stable(part.config))
    digest.update(_stable(processor) + _stable(scheduler))
    digest.update(_tokenizer_bytes(tokenizer_dir))
    return ModelSource(
        label=label,
        variant=variant.name,
        defaults=defaults,
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer_dir=tokenizer_dir,
        processor_config=processor,
        scheduler_config=scheduler,
        notes=variant.notes + tuple(note for part in parts for note in component.storage_notes(part)),
        fingerprint=digest.hexdigest(),
    )


def _marked(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(ZERO_COND_MARKER) for name in checkpoint.dropped)


def _stable(config: Mapping[str, Any]) -> bytes:
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return json.dumps(kept, sort_keys=True).encode()


def _tokenizer_bytes(folder: Path) -> bytes:
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        file = folder / name
        if file.is_file():
            digest.update(name.encode() + file.read_bytes())
    return digest.digest()


__all__ = ["TINY", "Component", "ModelSource", "known_names", "open_model"]
