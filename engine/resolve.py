"""From a request to a job: every number fixed against the model, every decision said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError, RequestError
from .defaults import Defaults
from .given import Given
from .job import Geometry, Job
from .keep.mask import resolve_mask
from .picture import Picture, calculate_dimensions, load_picture
from .reference.options import Reference
from .reference.resolve import resolve_masks, resolve_table
from .request import EditRequest, GenerateRequest
from .sizes import condition_size, reference_size, target_size
from .strength import DEFAULT_STRENGTH, actual_steps, start_notes

MAX_ASPECT_RATIO = 32
NOTHING_GIVEN = Given()


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
    given = request.given or NOTHING_GIVEN
    _check_count(len(images) or len(given.references), defaults)
    pictures = tuple(load_picture(image) for image in images)
    init = None if request.init_image is None else load_picture(request.init_image)
    notes: list[str] = []
    for picture in (*pictures, *([init] if init else [])):
        _check_ratio(picture)
        notes += picture.notes
    guidance = _guidance(request, defaults, notes)
    target = _target(request, pictures, init, defaults, multiple, notes)
    references = _references(request, pictures, target, defaults)
    fields: dict[str, Any] = {
        "num_inference_steps": request.num_inference_steps or defaults.num_inference_steps,
        "schedule": _schedule(request, defaults),
    }
    fields |= _steer(request, pictures, target, references, fields["num_inference_steps"], notes)
    if init is not None or (given.init is not None and not isinstance(request, EditRequest)):
        fields["denoise"] = DEFAULT_STRENGTH if request.strength is None else request.strength
    job = Job(
        kind="edit" if references else "generate",
        prompt=request.prompt,
        pictures=pictures,
        target=target,
        references=references,
        conditions=tuple(condition_size(picture.image.size, defaults) for picture in pictures),
        template=defaults.template,
        seed=request.seed,
        flow_shift=request.flow_shift,
        notes=tuple(notes),
        init=init,
        size_rule=request.size_rule,
        given=request.given,
        **guidance,
        **fields,
    )
    _check_given(job)
    return replace(job, notes=(*job.notes, *starting(job)))


def starting(job: Job) -> tuple[str, ...]:
    """What a user should hear of the step at which a run starts; nothing where it starts from noise by itself."""
    if job.denoise is None:
        return ()
    if job.kind == "generate":
        return start_notes(job.denoise, job.num_inference_steps, job.evaluations)
    if actual_steps(job.evaluations, job.denoise) == 0:
        return (f"no step is run: denoise {job.denoise:g} of {job.evaluations} steps is less than one",)
    return ()


def _steer(
    request: GenerateRequest,
    pictures: tuple[Picture, ...],
    target: Geometry,
    references: tuple[Geometry, ...],
    steps: int,
    notes: list[str],
) -> dict[str, Any]:
    """The fields of a job that say how its pictures, or their latents, act on it."""
    if not references:
        return {}
    if not isinstance(request, EditRequest):
        return {"table": resolve_table(Reference(), steps, (None,) * len(references))}
    masks, mask = (None,) * len(references), None
    if pictures:
        masks = resolve_masks(request.reference, pictures)
        size = pictures[0].image.size
        mask = resolve_mask(request.keep, picture_size=size, target=target, reference=references[0])
    notes += request.reference.notes()
    notes += [note for one in (*masks, mask) if one is not None for note in one.notes]
    return {
        "reference": request.reference,
        "table": resolve_table(request.reference, steps, masks),
        "masks": masks,
        "keep": request.keep,
        "mask": mask,
        "denoise": request.denoise,
        "resize_control": request.resize_control,
    }


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


def _check_given(job: Job) -> None:
    """Raise RequestError where what is given does not go with the rest."""
    given = job.given or NOTHING_GIVEN
    for name, latents, geometry in _latents(job, given):
        rows, columns = geometry.grid
        if tuple(latents.shape[-2:]) != (2 * rows, 2 * columns):
            raise RequestError(
                f"{name} must be {2 * rows} x {2 * columns} latent cells for this size, got {list(latents.shape)}",
                hint="encode it again for this size",
            )
    if job.references:
        _check_beside_references(job, given)
    if given.references and not job.pictures and job.start and given.init is None and not _starts_from_first(job):
        raise RequestError(
            "init must be given where a run starts from the first picture and its latents are of another size, "
            f"got {list(given.references[0].shape)}"
        )


def _check_beside_references(job: Job, given: Given) -> None:
    """Raise RequestError where embeddings do not serve the pictures that the text encoder saw."""
    if given.prompt_embeds is not None:
        if job.negative_prompt is not None and given.negative_embeds is None:
            raise RequestError(
                "negative_embeds must be given where the text encoder saw pictures and guidance is on, got none",
                hint="extract with the same guidance, or switch it off",
            )
        if len(job.casts) > 1 and not job.reference.keep_vision_at_zero:
            raise RequestError(
                "prompt_embeds must serve every step, got references that are not there in some of them",
                hint="leave the strengths at 0 out, or encode in the run",
            )
    elif not job.pictures:
        raise RequestError(
            "prompt_embeds must be given where pictures are there as latents alone, got none",
            hint="the text encoder sees the pictures too: extract the prompt where they are",
        )


def _starts_from_first(job: Job) -> bool:
    return job.references[0].grid == job.target.grid


def _latents(job: Job, given: Given) -> list[tuple[str, Any, Geometry]]:
    """What is given as latents, and the geometry that it must have."""
    if given.references and len(given.references) != len(job.references):
        raise RequestError(f"references must be {len(job.references)} as the pictures, got {len(given.references)}")
    named = [(f"references.{number}", each) for number, each in enumerate(given.references)]
    found = [(name, each, geometry) for (name, each), geometry in zip(named, job.references, strict=False)]
    return found + ([] if given.init is None else [("init", given.init, job.target)])


def _schedule(request: GenerateRequest, defaults: Defaults) -> str | None:
    if request.schedule is not None and defaults.schedule is None:
        raise RequestError(
            f"schedule must be left out with this model, got {request.schedule!r}",
            hint="it is one of Z-Image's; this model has one way to count steps",
        )
    chosen = request.schedule or defaults.schedule
    if chosen == "official9" and request.num_inference_steps == 1:
        raise RequestError("steps of the schedule official9 must be at least 2, got 1")
    return chosen


def _guidance(request: GenerateRequest, defaults: Defaults, notes: list[str]) -> dict[str, Any]:
    """The fields of a job that say how the prompts are weighed."""
    negative = request.negative_prompt if request.negative_prompt is not None else defaults.negative_prompt
    if defaults.guidance_scale is None:
        _refuse_foreign(request)
        scale = _true_cfg_scale(request, defaults, notes)
        fields: dict[str, Any] = {"true_cfg_scale": scale}
        on, unused = scale > 1, "true_cfg_scale is 1"
    else:
        scale = _guidance_scale(request, defaults.guidance_scale, notes)
        on, unused = scale > 0, "guidance_scale is 0"
        fields = {
            "true_cfg_scale": 1.0,
            "guidance_scale": scale,
            "cfg_normalization": request.cfg_normalization or 0.0,
            "cfg_truncation": 1.0 if request.cfg_truncation is None else request.cfg_truncation,
        }
    given = request.given is not None and request.given.negative_embeds is not None
    if not on and (given or request.negative_prompt is not None):
        notes.append(f"the negative prompt is not used: {unused}")
    return fields | {"negative_prompt": negative if on else None}


def _refuse_foreign(request: GenerateRequest) -> None:
    for name in ("cfg_normalization", "cfg_truncation"):
        if getattr(request, name) is not None:
            raise RequestError(
                f"{name} must be left out with this model, got {getattr(request, name):g}",
                hint="it belongs to Z-Image's guidance",
            )


def _guidance_scale(request: GenerateRequest, default: float, notes: list[str]) -> float:
    """G of ``p + g (p - n)``, one less than the scale w of ``n + w (p - n)``."""
    if request.true_cfg_scale is None:
        return float(default if request.guidance_scale is None else request.guidance_scale)
    if request.guidance_scale is not None:
        raise RequestError(
            f"guidance must be given once, got true_cfg_scale {request.true_cfg_scale:g} and "
            f"guidance_scale {request.guidance_scale:g}",
            hint="this model has guidance_scale; 0 switches it off",
        )
    chosen = float(request.true_cfg_scale - 1)
    notes.append(f"true_cfg_scale {request.true_cfg_scale:g} sets guidance_scale to {chosen:g}: this model counts so")
    return chosen


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
    request: GenerateRequest,
    pictures: Sequence[Picture],
    init: Picture | None,
    defaults: Defaults,
    multiple: int,
    notes: list[str],
) -> Geometry:
    asked = request.size if request.given is None or request.given.size is None else request.given.size
    if asked is None and init is not None:
        asked = _init_size(init, defaults, multiple, notes)
    if request.size_rule == "floor16":
        size = asked or target_size(None, [picture.image.size for picture in pictures], defaults)
        return _floored(size, multiple, notes)
    if asked is not None:
        target = Geometry(*asked, multiple)
        if target.padded != asked:
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


def _init_size(init: Picture, defaults: Defaults, multiple: int, notes: list[str]) -> tuple[int, int]:
    """The picture's own size; where that is more than the model's area, about that area in its shape."""
    width, height = init.image.size
    if width * height <= defaults.area_pixels:
        return width, height
    size = calculate_dimensions(defaults.area_pixels, width / height, multiple)
    notes.append(
        f"output is {size[0]}x{size[1]}: {init.label} is {width}x{height} and this model works at about that area"
    )
    return size


def _floored(size: tuple[int, int], multiple: int, notes: list[str]) -> Geometry:
    """Both sides rounded down to whole tokens."""
    width, height = (side // multiple * multiple for side in size)
    if not width or not height:
        raise RequestError(f"size must be at least {multiple}x{multiple} with floor16, got {size[0]}x{size[1]}")
    if (width, height) != size:
        notes.append(f"output is {width}x{height}: floor16 rounds {size[0]}x{size[1]} down to multiples of {multiple}")
    return Geometry(width, height, multiple)


def _references(
    request: GenerateRequest, pictures: Sequence[Picture], target: Geometry, defaults: Defaults
) -> tuple[Geometry, ...]:
    """Geometry of every picture as the VAE sees it; of given latents alone that of their cells."""
    multiple = target.multiple
    if not pictures:
        shapes = () if request.given is None else [latents.shape for latents in request.given.references]
        return tuple(Geometry(columns * multiple // 2, rows * multiple // 2, multiple) for *_, rows, columns in shapes)
    how = request.resize_control if isinstance(request, EditRequest) else None
    size = target.width, target.height
    sizes = [reference_size(picture.image.size, size, how, defaults) for picture in pictures]
    return tuple(Geometry(width, height, multiple) for width, height in sizes)
