"""From the flags' values to what is to be done: contradictions are refused here, ranges by the request itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError, RequestError
from .expand import looks_like_picture
from .memory import memory_choice
from .options import DEFAULT_SEED, OUTPUT_TYPES
from .outputs import Wish
from .steer import prompt_of, steering
from .zimage import refuse_in_edit, starting

IMAGE_SIZE_MULTIPLE = 16
MAX_COUNT = 10_000
SUGGESTED_MODEL = "qwen-image"
SINGLE_FILES = ("dit", "vae", "text_encoder")

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conditioned:
    """A job file and what is said over it.

    Attributes:
        file: path or URL.
        said: fields of its knobs and blend, and ``statistics``, that win over the file's.
        alone: the picture is taken without any prompt.
        sha256: the file must have it (``rerun``), or None.
    """

    file: str
    said: Mapping[str, Any]
    alone: bool = False
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one ``edit``, ``generate`` or ``rerun`` is to do.

    Attributes:
        kind: ``edit`` or ``generate``.
        images: input pictures.
        request: fields of the request but for images and seed.
        seeds: one result each.
        model: arguments of ``Engine.open``.
        wish: what was said about the output.
        preview: folder of step pictures, or None.
        masks: whether the masks of the steps are written beside the result.
        stages: of one edit, each a method and its strength.
        then: prompts that go on from the result.
        keep_original: every stage sees the first picture too.
        metadata: whether files carry metadata.
        as_json: whether stdout gets one JSON document.
        fingerprint: the model must have it (``rerun``), or None.
        rate: price of the machine per hour, or None.
        conditioning: the job file that the run goes on from, or None.
    """

    kind: str
    images: tuple[Path, ...] = ()
    request: Mapping[str, Any]
    seeds: tuple[int, ...]
    model: Mapping[str, Any]
    wish: Wish
    preview: Path | None = None
    masks: bool = False
    stages: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    keep_original: bool = False
    metadata: bool = True
    as_json: bool = False
    fingerprint: str | None = None
    rate: float | None = None
    conditioning: Conditioned | None = None

    @property
    def pictures(self) -> tuple[Path, ...]:
        """Every picture that is read: those to edit, or the one to start from."""
        init = self.request.get("init_image")
        return self.images if init is None else (*self.images, init)


def edit_order(words: Sequence[str], values: Values) -> Order:
    """The order of ``qengine edit``.

    Raises:
        RequestError: flags contradict each other, or the prompt or the picture is not given.
    """
    refuse_in_edit(values)
    prompt, images = split_words(words, values)
    images += [Path(name) for name in values["ref"]]
    if not images:
        raise RequestError("edit must get a picture, got none", hint='qengine edit photo.jpg "make it grayscale"')
    append = images[0].stem if values["append_original_name"] else ""
    stem = f"{images[0].stem}_edited"
    masks = [name for name in (values["mask"], *values["reference_mask"]) if name]
    read = (*images, *map(Path, masks))
    return _order("edit", prompt, tuple(images), values, make_wish(values, stem, append, read), steering(values))


def read_by(order: Order) -> tuple[Path, ...]:
    """The files that an order reads: its pictures, the one to start from, then its masks."""
    keep, reference = order.request.get("keep"), order.request.get("reference")
    masks = [*((keep.mask,) if keep is not None else ()), *(reference.masks if reference is not None else ())]
    return (*order.pictures, *(Path(mask) for mask in masks if mask is not None))


def generate_order(words: Sequence[str], values: Values) -> Order:
    """The order of ``qengine generate``.

    Raises:
        RequestError: flags contradict each other, or the prompt is not given.
        CheckpointError: no model is named; none that generates is inside qengine.
    """
    values = {**values, "prompt": prompt_of(values) or values["prompt"]}
    if len(words) > 1:
        raise RequestError(f"prompt must be given once, got {len(words)} words or phrases", hint="put it in quotes")
    if words and values["prompt"] is not None:
        raise RequestError(f"prompt must be given once, got {words[0]!r} and --prompt {values['prompt']!r}")
    prompt = words[0] if words else values["prompt"]
    if prompt is None:
        raise RequestError("prompt must be given, got none", hint='qengine generate "a red bicycle" --model MODEL')
    if values["model"] is None and not any(values[name] for name in SINGLE_FILES):
        raise CheckpointError(
            "model must be named: the one inside qengine only edits",
            hint=f"qengine pull {SUGGESTED_MODEL} && qengine generate {_quoted(prompt)} --model {SUGGESTED_MODEL}",
        )
    started = starting(values)
    never = (started["init_image"],) if "init_image" in started else ()
    return _order("generate", prompt, (), values, make_wish(values, "generated", "", never), started)


def split_words(words: Sequence[str], values: Values) -> tuple[str, list[Path]]:
    """The prompt and the pictures among the positional words: without ``--prompt`` the last word is the prompt.

    Raises:
        RequestError: there is no prompt, or more than one.
    """
    given = prompt_of(values) or values["prompt"]
    if given is None:
        if not words or looks_like_picture(words[-1]) or (len(words[-1]) < 256 and os.path.isfile(words[-1])):
            raise RequestError(
                f"prompt must be given after the pictures, got {words[-1] if words else 'none'}",
                hint='qengine edit photo.jpg "make it grayscale"',
            )
        words, given = words[:-1], words[-1]
    for word in words:
        if " " in word.strip() and not looks_like_picture(word) and not os.path.exists(word):
            raise RequestError(
                f"prompt must be given once, got {_short(word)!r} and {_short(given)!r}",
                hint="put the whole prompt in one pair of quotes",
            )
    return given, [Path(word) for word in words]


def check_files(images: Sequence[Path]) -> None:
    """Raise InputError for a picture that is not a file; what is in it is checked when it is read."""
    for path in images:
        if path.is_dir():
            raise InputError(f"{path} must be a picture, got a folder")
        if not path.is_file():
            raise InputError(f"{path} must be a picture, got no such file", hint="check the name and the folder")


def make_wish(values: Values, stem: str, append: str, never: tuple[Path, ...]) -> Wish:
    """What the output flags say."""
    kind = OUTPUT_TYPES[values["output_type"] or "images"]
    return Wish(values["output"], values["save_path"], kind, stem, append, never)


def seeds_of(seed: int | None, count: int | None) -> tuple[int, ...]:
    """seed, seed + 1, ...

    Raises:
        RequestError: the count is not a small positive number.
    """
    many = 1 if count is None else count
    if not 1 <= many <= MAX_COUNT:
        raise RequestError(f"count must be from 1 to {MAX_COUNT}, got {many}")
    first = DEFAULT_SEED if seed is None else seed
    return tuple(range(first, first + many))


def model_choice(values: Values) -> dict[str, Any]:
    """Arguments of ``Engine.open``; what is not given is left out.

    Raises:
        RequestError: ``--model`` and single files are both given, one of the three files is missing, or two flags
            name different variants.
    """
    given = [name for name in SINGLE_FILES if values[name]]
    if given and len(given) < len(SINGLE_FILES):
        missing = next(name for name in SINGLE_FILES if not values[name])
        raise RequestError(
            f"--dit, --vae and --text_encoder must be given together, got {', '.join('--' + name for name in given)}",
            hint=f"add --{missing}",
        )
    if given and values["model"] is not None:
        raise RequestError("a model must be named once, got --model and --dit", hint="leave one of them out")
    choice = {name: values[name] for name in ("model", *SINGLE_FILES, "tokenizer") if values[name] is not None}
    version = _version(values)
    if version is not None:
        choice["model_version"] = version
    choice["offline"] = values["offline"]
    return choice


def _version(values: Values) -> str | None:
    said = {
        "--model-version": values["model_version"],
        "--edit": "edit" if values.get("edit") else None,
        "--edit_plus": "edit-2509" if values.get("edit_plus") else None,
    }
    named = {flag: version for flag, version in said.items() if version is not None}
    # musubi's --edit_plus also stands beside 2511 files, so a version that says more than it wins
    if values.get("edit_plus") and values["model_version"] == "edit-2511":
        return "edit-2511"
    if len(set(named.values())) > 1:
        raise RequestError(f"the variant must be named once, got {' and '.join(named)}")
    return next(iter(named.values()), None)


def device_choice(values: Values) -> dict[str, Any]:
    """``device`` and ``dtype`` as asked, ``auto`` when not."""
    return {"device": values["device"] or "auto", "dtype": values["dtype"] or "auto"}


def request_fields(values: Values) -> dict[str, Any]:
    """Fields of the request that the flags set."""
    fields = {
        "negative_prompt": values["negative_prompt"],
        "size": _size(values["size"], values["image_size"]),
        "num_inference_steps": values["steps"],
        "true_cfg_scale": values["true_cfg_scale"],
        "guidance_scale": values["guidance_scale"],
        "flow_shift": values["flow_shift"],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _order(
    kind: str,
    prompt: str,
    images: tuple[Path, ...],
    values: Values,
    wish: Wish,
    steered: Mapping[str, Any] | None = None,
) -> Order:
    return Order(
        kind=kind,
        images=images,
        request={"prompt": prompt, **request_fields(values), **(steered or {})},
        seeds=seeds_of(values["seed"], values["count"]),
        model={**model_choice(values), **device_choice(values), **memory_choice(values)},
        wish=wish,
        preview=Path(values["preview"]) if values["preview"] else None,
        masks=bool(values.get("rcm_debug_save")),
        stages=tuple(values.get("stage") or ()),
        then=tuple(values.get("then") or ()),
        keep_original=bool(values.get("keep_original")),
        metadata=not values["no_metadata"],
        as_json=values["json"],
        rate=rate_of(values),
    )


def rate_of(values: Values) -> float | None:
    """The price per hour.

    Raises:
        RequestError: it is negative.
    """
    rate = values["cost_per_hour"]
    if rate is not None and not rate >= 0:
        raise RequestError(f"--cost-per-hour must be a price, got {rate:g}")
    return rate


def _size(size: str | None, image_size: str | None) -> tuple[int, int] | None:
    if size is not None and image_size is not None:
        raise RequestError("the size must be given once, got both --size and --image_size")
    if size is not None:
        width, height = _two_numbers(size.lower().replace("×", "x").split("x"), "--size must be WIDTHxHEIGHT", size)
        return width, height
    if image_size is None:
        return None
    parts = image_size.replace(",", " ").split()
    height, width = _two_numbers(parts, "--image_size must be a height and a width", image_size)
    if height % IMAGE_SIZE_MULTIPLE or width % IMAGE_SIZE_MULTIPLE:
        raise RequestError(
            f"--image_size must be two multiples of {IMAGE_SIZE_MULTIPLE}, got {height} {width}",
            hint=f"--size {width}x{height} takes any size",
        )
    return width, height


def _two_numbers(parts: Sequence[str], rule: str, text: str) -> tuple[int, int]:
    try:
        first, second = (int(part) for part in parts)
    except ValueError as error:
        raise RequestError(f"{rule}, got {text!r}") from error
    return first, second


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(_short(text))


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
