"""``qengine rerun out.png``: the same run again, from what the picture says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, RequestError
from . import backend
from .conditioning import recorded
from .memory import memory_choice
from .order import SINGLE_FILES, Order, check_files, device_choice, make_wish, model_choice, rate_of, seeds_of
from .progress import Talk

FORMAT = 1
REQUEST_FIELDS = (
    "prompt",
    "negative_prompt",
    "size",
    "num_inference_steps",
    "true_cfg_scale",
    "guidance_scale",
    "flow_shift",
    "resize_control",
    "denoise",
    "strength",
    "schedule",
    "cfg_normalization",
    "cfg_truncation",
    "size_rule",
)


def rerun_order(picture: Path, values: Mapping[str, Any], talk: Talk) -> Order:
    """The order that made ``picture``, with the changes that the flags ask for.

    Raises:
        InputError: the picture has no record, or an input picture is not found unchanged.
        RequestError: flags contradict each other.
    """
    check_files([picture])
    record = checked_record(picture, backend.read_metadata(picture))
    images = _images(record, picture, values, talk)
    request = {name: record["request"][name] for name in REQUEST_FIELDS if record["request"].get(name) is not None}
    if "size" in request:
        request["size"] = tuple(request["size"])
    request |= _kept(record["request"], picture) | _referred(record["request"], picture)
    request |= _started(record["request"], picture, values, talk)
    never = (*images, *([request["init_image"]] if "init_image" in request else []), picture)
    seed = values["seed"] if values["seed"] is not None else record["request"]["seed"]
    choice = model_choice(values)
    named = any(choice.get(name) for name in ("model", *SINGLE_FILES))
    model = choice if named else {**_recorded_model(record), **choice}
    return Order(
        kind=record["kind"],
        images=images,
        request=request,
        seeds=seeds_of(seed, values["count"]),
        model={**model, **_device(record, values), **memory_choice(values, _numerics(record, picture))},
        wish=make_wish(values, f"{picture.stem}_rerun", "", never),
        preview=Path(values["preview"]) if values["preview"] else None,
        metadata=not values["no_metadata"],
        as_json=values["json"],
        fingerprint=None if named else record["model"]["fingerprint"],
        rate=rate_of(values),
        conditioning=recorded(record, picture, values),
    )


def checked_record(picture: Path, record: Any) -> dict[str, Any]:
    """The record, if it is one that this version can repeat.

    Raises:
        InputError: it is missing, damaged or of a later format.
    """
    if not isinstance(record, dict) or not record:
        raise InputError(
            f"{picture} must carry a qengine record, got none", hint="was it saved again, or made with --no-metadata?"
        )
    if record.get("format") != FORMAT:
        raise InputError(f"the record in {picture} must have format {FORMAT}, got {record.get('format')!r}")
    shape = {"kind": str, "model": dict, "request": dict, "inputs": list}
    wrong = [name for name, kind in shape.items() if not isinstance(record.get(name), kind)]
    if wrong or record["kind"] not in ("edit", "generate") or not _is_whole(record):
        without = ", ".join(wrong) or "content"
        raise InputError(f"the record in {picture} must be whole, got one without a usable {without}")
    return record


def _is_whole(record: Mapping[str, Any]) -> bool:
    request, model = record["request"], record["model"]
    inputs_whole = all(
        isinstance(each, dict) and isinstance(each.get("path"), str) and isinstance(each.get("sha256"), str)
        for each in record["inputs"]
    )
    return inputs_whole and "prompt" in request and "seed" in request and "label" in model and "fingerprint" in model


def _recorded_model(record: Mapping[str, Any]) -> dict[str, Any]:
    files = record["model"].get("files")
    if isinstance(files, dict) and "dit" in files:
        return dict(files)
    label = record["model"]["label"]
    return {**(files or {}), "model": None if label == "tiny" else label}


def _numerics(record: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The recorded choices that decide bits, as the values of their flags; none in records of before there were any."""
    said = record.get("numerics", {})
    texts = [said.get(name, "") if isinstance(said, dict) else None for name in ("vae_tile", "pinned", "attention")]
    tile, pinned, attention = map(str, texts)
    if not all(isinstance(text, str) for text in texts) or not (tile == "" or tile.isdecimal()):
        raise InputError(f"the record in {picture} must be whole, got one without usable numerics")
    known = {name: said[name] for name in ("weights", "text_encoder_weights", "vae_weights") if name in said}
    if tile:
        known["vae_tile"] = int(tile)
    known |= {"attn_mode": attention} if attention else {}
    known |= {"kernel": tuple(pinned.split())} if pinned else {}
    if said.get("text_encoder_device") == "cpu" and record.get("device") != "cpu":
        known["text_encoder_cpu"] = True
    return known


def _kept(request: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The recorded options of what is kept, their mask found by its bytes."""
    from ..engine.keep.options import Keep

    kept = request.get("keep")
    if kept is None:
        return {}
    known = {field.name for field in dataclasses.fields(Keep)}
    if not isinstance(kept, dict) or not kept.keys() <= known:
        raise InputError(f"the record in {picture} must be whole, got one without usable options of what is kept")
    mask = kept.get("mask")
    if not isinstance(mask, dict):
        return {"keep": Keep(**{**kept, "mask": None})}
    return {"keep": Keep(**{**kept, "mask": _find(str(mask["path"]), str(mask["sha256"]), picture)})}


def _referred(request: Mapping[str, Any], picture: Path) -> dict[str, Any]:
    """The recorded options of the references, their masks found by their bytes."""
    from ..engine.reference.options import Reference

    said = request.get("reference")
    if said is None:
        return {}
    known = {field.name for field in dataclasses.fields(Reference)}
    if not isinstance(said, dict) or not said.keys() <= known:
        raise InputError(f"the record in {picture} must be whole, got one without usable options of its references")
    strength = said.get("strength", 1.0)
    masks = tuple(_mask_file(mask, picture) for mask in said.get("masks", ()))
    return {
        "reference": Reference(
            **{**said, "strength": tuple(strength) if isinstance(strength, list) else strength, "masks": masks}
        )
    }


def _started(request: Mapping[str, Any], picture: Path, values: Mapping[str, Any], talk: Talk) -> dict[str, Any]:
    """The picture that a recorded run started from, found by its bytes or named anew.

    Raises:
        InputError: it is not found unchanged.
        RequestError: the recorded run started from no picture.
    """
    said, named = request.get("init_image"), values.get("init_image")
    if not isinstance(said, dict):
        if named is not None:
            raise RequestError("--init-image must be used with a run that started from a picture, got another")
        return {}
    digest = str(said.get("sha256"))
    if named is None:
        return {"init_image": _find(str(said.get("path")), digest, picture, "--init-image")}
    check_files([Path(named)])
    if sha256_of(Path(named)) != digest:
        talk.warn("the picture given by --init-image is not the recorded one, so the result will differ")
    return {"init_image": Path(named)}


def _mask_file(mask: Any, picture: Path) -> Path | None:
    return _find(str(mask["path"]), str(mask["sha256"]), picture) if isinstance(mask, dict) else None


def _device(record: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded device and dtype, unless the flags name others."""
    choice = device_choice(values)
    for name in ("device", "dtype"):
        if values[name] is None and isinstance(record.get(name), str):
            choice[name] = record[name]
    return choice


def _images(record: Mapping[str, Any], picture: Path, values: Mapping[str, Any], talk: Talk) -> tuple[Path, ...]:
    wanted = record["inputs"]
    if values["ref"]:
        if record["kind"] == "generate":
            raise RequestError("--ref must be used with a recorded edit, got a recorded generation")
        images = tuple(Path(name) for name in values["ref"])
        check_files(images)
        if [sha256_of(path) for path in images] != [each["sha256"] for each in wanted]:
            talk.warn("the pictures given by --ref are not the recorded ones, so the result will differ")
        return images
    return tuple(_find(each["path"], each["sha256"], picture) for each in wanted)


def _find(recorded: str, digest: str, picture: Path, flag: str = "--ref") -> Path:
    """The recorded input, by its path or beside the picture, if its bytes are the recorded ones."""
    name = recorded.replace("\\", "/").rsplit("/", 1)[-1]
    candidates: Sequence[Path] = [path for path in (Path(recorded), picture.parent / name) if path.is_file()]
    for path in candidates:
        if sha256_of(path) == digest:
            return path
    if candidates:
        raise InputError(
            f"input picture {candidates[0]} must be the recorded one (sha256 {digest[:12]}), got a changed file",
            hint=f"give the original with {flag}, or another picture to use that one instead",
        )
    raise InputError(f"input picture {recorded} must be there, got no such file", hint=f"give it with {flag}")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
