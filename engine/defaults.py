"""What each model does when it is not told otherwise; nothing else in qengine holds a default of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError


@dataclass(frozen=True)
class Defaults:
    """Defaults of one model.

    Attributes:
        num_inference_steps: network evaluations per branch.
        true_cfg_scale: 1.0 runs the prompt alone; the only value where the model has a ``guidance_scale``.
        negative_prompt: prompt of the second branch, where guidance runs one.
        area_pixels: area of the picture made when no size is asked.
        template: prompt template of the encoder: ``text``, ``edit``, ``edit-plus`` or ``z-image``.
        condition_area_pixels: area of a picture as the vision tower sees it.
        reference_area_pixels: area of a picture as the VAE encodes it; None encodes it at the size of the output.
        size_from_last: the last picture gives the output its aspect ratio; otherwise the first.
        max_references: most pictures a request may carry.
        guidance_scale: g of ``p + g (p - n)``, 0 runs the prompt alone; None where the model is guided by
            ``true_cfg_scale``.
        schedule: how steps are counted, of a model that knows several ways.
    """

    num_inference_steps: int
    true_cfg_scale: float
    negative_prompt: str
    area_pixels: int
    template: str
    condition_area_pixels: int = 384 * 384
    reference_area_pixels: int | None = 1024 * 1024
    size_from_last: bool = True
    max_references: int | None = None
    guidance_scale: float | None = None
    schedule: str | None = None


def _zimage(steps: int, guidance_scale: float) -> Defaults:
    return Defaults(
        steps,
        1.0,
        "",
        1024 * 1024,
        "z-image",
        max_references=0,
        guidance_scale=guidance_scale,
        schedule="modern",
    )


DEFAULTS: dict[str, Defaults] = {
    "qwen-image": Defaults(25, 4.0, " ", 1024 * 1024, "text", max_references=0),
    "qwen-image-edit": Defaults(
        25,
        4.0,
        " ",
        1024 * 1024,
        "edit",
        condition_area_pixels=1024 * 1024,
        size_from_last=False,
        max_references=1,
    ),
    "qwen-image-edit-2509": Defaults(25, 4.0, " ", 1024 * 1024, "edit-plus"),
    "qwen-image-edit-2511": Defaults(8, 4.0, " ", 1024 * 1024, "edit-plus"),
    "z-image": _zimage(28, 4.0),
    "z-image-turbo": _zimage(9, 0.0),
    "tiny": Defaults(8, 1.0, " ", 256 * 256, "edit-plus", reference_area_pixels=None),
}


def defaults_of(name: str) -> Defaults:
    """The defaults of a model.

    Raises:
        CheckpointError: the engine does not run this model.
    """
    if name not in DEFAULTS:
        known = ", ".join(each for each in DEFAULTS if each != "tiny")
        raise CheckpointError(
            f"model must be one that this engine runs ({known}), got {name}", hint="qengine pull qwen-image-edit-2511"
        )
    return DEFAULTS[name]
