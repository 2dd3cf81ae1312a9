"""A request resolved against a model: every number fixed, every decision said, nothing computed yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, RequestError
from .defaults import Defaults
from .keep.mask import resolve_mask
from .keep.options import Keep
from .picture import Picture, load_picture
from .request import EditRequest, GenerateRequest
from .sizes import condition_size, reference_size, target_size

MAX_ASPECT_RATIO = 32


@dataclass(frozen=True)
class Geometry:
    """Size of a picture and of the token grid that carries it.

    Attributes:
        width: exact width in pixels.
        height: exact height in pixels.
        multiple: pixels per token side; the picture is padded up to it inside the engine and cropped after.
    """

    width: int
    height: int
    multiple: int

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns."""
        return -(-self.height // self.multiple), -(-self.width // self.multiple)

    @property
    def padded(self) -> tuple[int, int]:
        """(width, height) of the padded picture."""
        rows, columns = self.grid
        return columns * self.multiple, rows * self.multiple


@dataclass(frozen=True)
class Job:
    """Everything a run needs to know.

    Attributes:
        kind: ``edit`` or ``generate``.
        prompt: as asked.
        negative_prompt: the second branch's prompt, or None for one branch.
        pictures: the loaded input pictures.
        target: geometry of the output.
        references: geometry of every picture as the VAE sees it.
        conditions: (width, height) of every picture as the vision tower sees it.
        template: prompt template of the encoder.
        num_inference_steps: steps.
        true_cfg_scale: guidance scale; 1 for one branch.
        seed: seed of the noise.
        flow_shift: static shift or None.
        resize_control: at which size the VAE sees the pictures, where that was asked.
        keep: what of the first picture is kept.
        mask: its mask at the size of the output, mode L, or None.
        notes: decisions worth telling, one sentence each.
    """

    kind: str
    prompt: str
    negative_prompt: str | None
    pictures: tuple[Picture, ...]
    target: Geometry
    references: tuple[Geometry, ...]
    conditions: tuple[tuple[int, int], ...]
    template: str
    num_inference_steps: int
    true_cfg_scale: float
    seed: int
    flow_shift: float | None
    resize_control: str | None
    keep: Keep
    mask: Picture | None
    notes: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The resolved request as JSON values; a request made from it gives the same job."""
        plain = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "size": [self.target.width, self.target.height],
            "num_inference_steps": self.num_inference_steps,
            "true_cfg_scale": self.true_cfg_scale,
            "seed": self.seed,
            "flow_shift": self.flow_shift,
        }
        sized = {} if self.resize_control is None else {"resize_control": self.resize_control}
        return plain | sized | ({} if self.keep.rule is None else {"keep": self._kept()})

    def _kept(self) -> dict[str, Any]:
        mask = {} if self.mask is None else {"mask": {"path": self.mask.label, "sha256": self.mask.sha256}}
        return self.keep.record() | mask

    def key(self, surroundings: Mapping[str, str]) -> str:
        """Identity of the run: the resolved request, the pictures and the surroundings given."""
        content = [self.record(), [p.sha256 for p in self.pictures], dict(surroundings)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolve(request: GenerateRequest, defaults: Defaults, multiple: int) -> Job:
    """Fix every number of a request.

    Args:
        request: what was asked.
        defaults: the model's defaults.
        multiple: pixels per token side of the model.

    Raises:
        RequestError: the model does not do what is asked.
        InputError: a picture cannot be used.
    """
    images = request.images if isinstance(request, EditRequest) else ()
    _check_count(len(images), defaults)
    pictures = tuple(load_picture(image) for image in images)
    notes = [note for picture in pictures for note in picture.notes]
    for picture in pictures:
        _check_ratio(picture)
    scale = _true_cfg_scale(request, defaults, notes)
    negative = request.negative_prompt if request.negative_prompt is not None else defaults.negative_prompt
    if scale == 1 and request.negative_prompt is not None:
        notes.append("the negative prompt is not used: true_cfg_scale is 1")
    target = _target(request, pictures, defaults, multiple, notes)
    how = request.resize_control if isinstance(request, EditRequest) else None
    whole = target.width, target.height
    references = tuple(Geometry(*reference_size(p.image.size, whole, how, defaults), multiple) for p in pictures)
    keep = request.keep if isinstance(request, EditRequest) else Keep()
    mask = resolve_mask(
        keep,
        picture_size=pictures[0].image.size if pictures else None,
        target=target,
        reference=references[0] if references else None,
    )
    notes.extend(mask.notes if mask is not None else ())
    return Job(
        kind="edit" if pictures else "generate",
        prompt=request.prompt,
        negative_prompt=negative if scale > 1 else None,
        pictures=pictures,
        target=target,
        references=references,
        conditions=tuple(condition_size(picture.image.size, defaults) for picture in pictures),
        template=defaults.template,
        num_inference_steps=request.num_inference_steps or defaults.num_inference_steps,
        true_cfg_scale=scale,
        seed=request.seed,
        flow_shift=request.flow_shift,
        resize_control=how,
        keep=keep,
        mask=mask,
        notes=tuple(notes),
    )


def _check_count(count: int, defaults: Defaults) -> None:
    if defaults.max_references == 0 and count:
        raise RequestError(
            f"this model must get text alone, got {count} picture(s)",
            hint="use an edit model, e.g. qwen-image-edit-2511",
        )
    if defaults.max_references != 0 and not count:
        raise RequestError(
            "this model must get a picture to edit, got none", hint="use --model qwen-image for text alone"
        )
    if defaults.max_references is not None and count > defaults.max_references:
        raise RequestError(
            f"this model must get at most {defaults.max_references} picture, got {count}",
            hint="use qwen-image-edit-2509 or -2511 for several",
        )


def _check_ratio(picture: Picture) -> None:
    width, height = picture.image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{picture.label} must be at most {MAX_ASPECT_RATIO} times as long as wide, got {width}x{height}",
            hint="crop it first",
        )


def _true_cfg_scale(request: GenerateRequest, defaults: Defaults, notes: list[str]) -> float:
    if request.guidance_scale is None:
        chosen = request.true_cfg_scale if request.true_cfg_scale is not None else defaults.true_cfg_scale
    elif request.true_cfg_scale is not None:
        notes.append("guidance_scale is ignored: this model has no embedded guidance and true_cfg_scale is given")
        chosen = request.true_cfg_scale
    else:
        chosen = max(1.0, request.guidance_scale)
        notes.append(f"guidance_scale sets true_cfg_scale to {chosen:g}: this model has no embedded guidance")
    return float(chosen)


def _target(
    request: GenerateRequest, pictures: Sequence[Picture], defaults: Defaults, multiple: int, notes: list[str]
) -> Geometry:
    if request.size is not None:
        target = Geometry(*request.size, multiple)
        if target.padded != request.size:
            wide, high = target.padded
            notes.append(
                f"{target.width}x{target.height} is made as {wide}x{high} (multiples of {multiple}) and cropped"
            )
        return target
    width, height = target_size(None, [picture.image.size for picture in pictures], defaults)
    if not pictures:
        return Geometry(width, height, multiple)
    lead = pictures[-1 if defaults.size_from_last else 0]
    if (width, height) != lead.image.size:
        was = "x".join(map(str, lead.image.size))
        notes.append(f"output is {width}x{height}: {lead.label} is {was} and this model works at about that area")
    return Geometry(width, height, multiple)
