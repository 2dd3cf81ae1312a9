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
from .reference.options import Reference, StepReference
from .reference.resolve import resolve_masks, resolve_table
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
        notes: decisions worth telling, one sentence each.
        reference: options of the references.
        table: what the references do in each step.
        masks: of the references, at the size of each picture; None where all of it is one.
        keep: options of what is kept.
        mask: of what is kept, white = change, at the size of the output.
        denoise: share of the schedule that is run, or None.
        resize_control: as asked.
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
    notes: tuple[str, ...]
    reference: Reference = Reference()
    table: tuple[StepReference, ...] = ()
    masks: tuple[Picture | None, ...] = ()
    keep: Keep = Keep()
    mask: Picture | None = None
    denoise: float | None = None
    resize_control: str | None = None

    @property
    def start(self) -> int:
        """The first step that is run: ``n - int(n denoise)``.

        The product is raised by 1e-9, so that 0.29 of 100 steps are 29.
        """
        steps = self.num_inference_steps
        return 0 if self.denoise is None else steps - int(steps * self.denoise + 1e-9)

    @property
    def anchored(self) -> bool:
        """The clean latents of the first picture are needed at the size of the output."""
        return bool(self.pictures) and (self.start > 0 or self.keep.rule is not None)

    @property
    def steered(self) -> bool:
        """A step differs from what the model was trained for, by more than which pictures are there."""
        steps = self.table[min(self.start, self.num_inference_steps - 1) :]
        usual = {"default", "concat", "cross_attn"}
        plain = all(step.method in usual and set(step.strengths) <= {0.0, 1.0} for step in steps)
        return self.anchored or not plain or any(self.masks)

    def cast(self, step: int) -> tuple[int, ...]:
        """Places of the pictures that the transformer sees in a step."""
        return self.table[step].present if self.table else ()

    def shown(self, cast: tuple[int, ...]) -> tuple[int, ...]:
        """Places of the pictures that the text encoder sees beside a cast."""
        return tuple(range(len(self.pictures))) if self.reference.keep_vision_at_zero else cast

    @property
    def casts(self) -> tuple[tuple[int, ...], ...]:
        """The different casts of the steps that are run, in their order; at least one."""
        steps = range(min(self.start, self.num_inference_steps - 1), self.num_inference_steps)
        return tuple(dict.fromkeys(self.cast(step) for step in steps))

    def template_for(self, shown: tuple[int, ...]) -> str:
        """Prompt template where the text encoder sees these pictures: without any that of text alone."""
        return self.template if shown or not self.pictures else "text"

    def record(self) -> dict[str, Any]:
        """The resolved request as JSON values; a request made from it gives the same job."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "size": [self.target.width, self.target.height],
            "num_inference_steps": self.num_inference_steps,
            "true_cfg_scale": self.true_cfg_scale,
            "seed": self.seed,
            "flow_shift": self.flow_shift,
            **self._steering(),
        }

    def _steering(self) -> dict[str, Any]:
        """What was asked of references, keeping, start and sizes; nothing where nothing was."""
        masks = [_named(mask) for mask in self.masks]
        reference = self.reference.record() | ({"masks": masks} if any(masks) else {})
        keep = self.keep.record() | ({} if self.mask is None else {"mask": _named(self.mask)})
        said = {
            "reference": reference or None,
            "keep": keep or None,
            "denoise": self.denoise,
            "resize_control": self.resize_control,
        }
        return {name: value for name, value in said.items() if value is not None}

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
    references = _references(request, pictures, target, defaults)
    steps = request.num_inference_steps or defaults.num_inference_steps
    steering = {}
    if isinstance(request, EditRequest):
        steering = _steer(request, pictures, target, references[0], steps, notes)
    return Job(
        kind="edit" if pictures else "generate",
        prompt=request.prompt,
        negative_prompt=negative if scale > 1 else None,
        pictures=pictures,
        target=target,
        references=references,
        conditions=tuple(condition_size(picture.image.size, defaults) for picture in pictures),
        template=defaults.template,
        num_inference_steps=steps,
        true_cfg_scale=scale,
        seed=request.seed,
        flow_shift=request.flow_shift,
        notes=tuple(notes),
        **steering,
    )


def _steer(
    request: EditRequest,
    pictures: tuple[Picture, ...],
    target: Geometry,
    first: Geometry,
    steps: int,
    notes: list[str],
) -> dict[str, Any]:
    """The fields of a job that say how its pictures act on it."""
    masks = resolve_masks(request.reference, pictures)
    mask = resolve_mask(request.keep, picture_size=pictures[0].image.size, target=target, reference=first)
    notes += request.reference.notes()
    notes += [note for one in (*masks, mask) if one is not None for note in one.notes]
    if request.denoise is not None and int(steps * request.denoise + 1e-9) == 0:
        notes.append(f"no step is run: denoise {request.denoise:g} of {steps} steps is less than one")
    return {
        "reference": request.reference,
        "table": resolve_table(request.reference, steps, masks),
        "masks": masks,
        "keep": request.keep,
        "mask": mask,
        "denoise": request.denoise,
        "resize_control": request.resize_control,
    }


def _named(mask: Picture | None) -> dict[str, str] | None:
    return None if mask is None else {"path": mask.label, "sha256": mask.sha256}


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
    lead = pictures[-1 if defaults.size_from_last else 0] if pictures else None
    if lead is not None and (width, height) != lead.image.size:
        was = "x".join(map(str, lead.image.size))
        notes.append(f"output is {width}x{height}: {lead.label} is {was} and this model works at about that area")
    return Geometry(width, height, multiple)


def _references(
    request: GenerateRequest, pictures: Sequence[Picture], target: Geometry, defaults: Defaults
) -> tuple[Geometry, ...]:
    how = request.resize_control if isinstance(request, EditRequest) else None
    size = target.width, target.height
    sizes = [reference_size(picture.image.size, size, how, defaults) for picture in pictures]
    return tuple(Geometry(width, height, target.multiple) for width, height in sizes)
