"""Which model it is: from the pipeline's class, the config, a marker in its file, its name, or the user's word.

Edit-2509 and Edit-2511 differ in nothing but ``zero_cond_t``: with it, reference tokens are modulated as at timestep 0.
A 2511 run without it gives a wrong picture and no error, so it is never guessed. Z-Image and Z-Image-Turbo differ in
nothing but their values, so their name tells, or the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, RequestError

HUB_IDS: Mapping[str, str] = MappingProxyType(
    {
        "qwen-image": "Qwen/Qwen-Image",
        "qwen-image-edit": "Qwen/Qwen-Image-Edit",
        "qwen-image-edit-2509": "Qwen/Qwen-Image-Edit-2509",
        "qwen-image-edit-2511": "Qwen/Qwen-Image-Edit-2511",
        "z-image": "Tongyi-MAI/Z-Image",
        "z-image-turbo": "Tongyi-MAI/Z-Image-Turbo",
    }
)
READERS: Mapping[str, str] = MappingProxyType(
    {
        "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
        "qwen3-vl-4b-thinking": "Qwen/Qwen3-VL-4B-Thinking",
    }
)
"""Models that read pictures for Z-Image: in the layout of transformers, and named by ``--vl-model``."""

ZIMAGE = ("z-image", "z-image-turbo")
ZIMAGE_CLASSES = ("ZImagePipeline", "ZImageImg2ImgPipeline")
VERSIONS: Mapping[str, str] = MappingProxyType(
    {
        "original": "qwen-image",
        "edit": "qwen-image-edit",
        "edit-2509": "qwen-image-edit-2509",
        "edit-2511": "qwen-image-edit-2511",
        "z-image": "z-image",
        "z-image-turbo": "z-image-turbo",
    }
)
_CLASSES = MappingProxyType(
    {
        "QwenImagePipeline": ("qwen-image",),
        "QwenImageEditPipeline": ("qwen-image-edit",),
        "QwenImageEditPlusPipeline": ("qwen-image-edit-2509", "qwen-image-edit-2511"),
        **dict.fromkeys(ZIMAGE_CLASSES, ZIMAGE),
    }
)
_PLUS_2509, _PLUS_2511 = "qwen-image-edit-2509", "qwen-image-edit-2511"


@dataclass(frozen=True)
class Variant:
    """Which model it is.

    Attributes:
        name: a key of ``HUB_IDS``.
        zero_cond_t: reference tokens are modulated as at timestep 0.
        notes: how this is known, where the user should hear of it.
    """

    name: str
    zero_cond_t: bool
    notes: tuple[str, ...] = ()


def known_names() -> tuple[str, ...]:
    """Short names that ``open_model`` takes."""
    return ("tiny", *HUB_IDS)


def pipeline_classes() -> tuple[str, ...]:
    """Pipeline classes of model_index.json that we run."""
    return tuple(_CLASSES)


def resolve_known(name: str) -> str | None:
    """The hub id of a short name; None for a path or a hub id.

    Raises:
        CheckpointError: a single word that is no known name, with the nearest ones.
    """
    hub_id = HUB_IDS.get(name.lower())
    if hub_id or "/" in name or "\\" in name or name.startswith((".", "~")):
        return hub_id
    near = difflib.get_close_matches(name.lower(), known_names(), n=2, cutoff=0.6)
    raise CheckpointError(
        f"model must be a folder, a hub id (owner/name) or one of {', '.join(known_names())}, got {name!r}",
        hint=f"did you mean {' or '.join(near)}?" if near else "qengine ls lists the models that are present",
    )


def folder_variant(
    model_index: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    marked: bool,
    names: Sequence[str],
    model_version: str | None,
) -> Variant:
    """The variant of a diffusers folder.

    Args:
        model_index: its model_index.json.
        config: the transformer's config.json.
        marked: the transformer's file has the tensor ``__index_timestep_zero__``.
        names: the folder's name and the other names that the model goes by.
        model_version: the user's word, or None.

    Raises:
        CheckpointError: another pipeline, contradicting evidence, or a name with 2511 and no flag.
        RequestError: ``model_version`` is unknown.
    """
    pipeline = model_index.get("_class_name")
    candidates = _CLASSES.get(pipeline) if isinstance(pipeline, str) else None
    if candidates is None:
        raise CheckpointError(f"pipeline class must be one of {', '.join(_CLASSES)}, got {pipeline!r:.80}")
    asked = _asked(model_version)
    if asked and asked not in candidates:
        raise CheckpointError(
            f"--model-version of a {pipeline} must give {' or '.join(candidates)}, got {model_version}"
        )
    if candidates == ZIMAGE:
        return zimage_variant(names, model_version)
    flag = config.get("zero_cond_t")
    if marked and flag is False:
        raise CheckpointError("zero_cond_t in the config must be true, as the marker in the file says, got false")
    if len(candidates) == 1:
        if flag or marked:
            raise CheckpointError(f"zero_cond_t of a {pipeline} must be false, got true")
        return Variant(candidates[0], zero_cond_t=False)
    if asked:
        return _stated(asked, bool(flag or marked), model_version or "")
    if flag or marked:
        return Variant(_PLUS_2511, zero_cond_t=True)
    _refuse_2511(names)
    return Variant(_PLUS_2509, zero_cond_t=False)


def zimage_variant(names: Sequence[str], model_version: str | None) -> Variant:
    """Z-Image or Z-Image-Turbo: by the user's word, else by the first name that says Z-Image.

    Args:
        names: the folder's or file's name and the other names that the model goes by.
        model_version: ``z-image`` or ``z-image-turbo``, or None.

    Raises:
        CheckpointError: ``model_version`` is another model's.
        RequestError: neither a name nor ``model_version`` tells, or ``model_version`` is unknown.
    """
    asked = _asked(model_version)
    if asked is not None:
        if asked not in ZIMAGE:
            raise CheckpointError(f"--model-version of Z-Image must be {' or '.join(ZIMAGE)}, got {model_version}")
        return Variant(asked, zero_cond_t=False)
    for name in names:
        last = name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().replace("_", "-")
        if "z-image" in last or "zimage" in last:
            return Variant("z-image-turbo" if "turbo" in last else "z-image", zero_cond_t=False)
    raise RequestError(
        f"--model-version must be given where no name says which Z-Image it is, got {' '.join(filter(None, names))}",
        hint=f"add --model-version {' or '.join(ZIMAGE)}: their tensors have the same names and shapes",
    )


def single_variant(config: Mapping[str, Any], *, marked: bool, file_name: str, model_version: str | None) -> Variant:
    """The variant of a single transformer file.

    Args:
        config: from the config.json beside it, or detected.
        marked: the file has the tensor ``__index_timestep_zero__``.
        file_name: its name.
        model_version: the user's word, or None.

    Raises:
        CheckpointError: contradicting evidence, or a name with 2511 and no flag.
        RequestError: ``model_version`` is unknown, or missing where the file cannot tell.
    """
    asked = _asked(model_version)
    zero = marked or bool(config.get("zero_cond_t"))
    if asked:
        variant = _stated(asked, zero, model_version or "")
        if "2511" in file_name and not variant.zero_cond_t:
            note = f"{file_name} is named 2511 but runs as {model_version}, as --model-version says"
            return Variant(variant.name, variant.zero_cond_t, (*variant.notes, note))
        return variant
    if zero:
        how = "the marker in the file" if marked else "the config.json beside the file"
        return Variant(_PLUS_2511, zero_cond_t=True, notes=(f"taken as Edit-2511: {how} says zero_cond_t",))
    _refuse_2511((file_name,))
    raise RequestError(
        "--model-version must be given with single files, got none: the headers of the models are the same",
        hint="add --model-version original, edit, edit-2509 or edit-2511",
    )


def _stated(asked: str, evidence: bool, model_version: str) -> Variant:
    """The user's word against what the file says."""
    if asked == _PLUS_2511:
        notes = (
            () if evidence else ("zero_cond_t is on because --model-version says edit-2511; the file does not tell",)
        )
        return Variant(asked, zero_cond_t=True, notes=notes)
    if evidence:
        raise CheckpointError(
            f"--model-version must be edit-2511, as zero_cond_t of the file says, got {model_version}",
            hint="leave --model-version out",
        )
    return Variant(asked, zero_cond_t=False)


def _asked(model_version: str | None) -> str | None:
    if model_version is None:
        return None
    name = VERSIONS.get(model_version.lower().replace("_", "-"))
    if name is None:
        near = difflib.get_close_matches(model_version, VERSIONS, n=1)
        raise RequestError(
            f"--model-version must be one of {', '.join(VERSIONS)}, got {model_version!r}",
            hint=f"did you mean {near[0]}?" if near else None,
        )
    return name


def _refuse_2511(names: Collection[str]) -> None:
    named = next((name for name in names if "2511" in name.replace("\\", "/").rstrip("/").rpartition("/")[2]), None)
    if named:
        raise CheckpointError(
            f"{named} must say zero_cond_t (in transformer/config.json or by its marker), "
            f"got neither, though it is named 2511",
            hint="add --model-version edit-2511 if it is that model, or edit-2509 if it is not",
        )
