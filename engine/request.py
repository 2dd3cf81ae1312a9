"""What a user asks for, and nothing about how it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import RequestError
from .keep.options import Keep
from .reference.options import Reference

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE_PIXELS = 8192
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
RESIZE_CONTROLS = ("image", "official", "none")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low:g} to {high:g}, got {value:g}")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A picture from text. Fields left None take the model's default (``qengine info MODEL`` prints them).

    Attributes:
        prompt: what to make; not empty.
        negative_prompt: what to steer away from; used when ``true_cfg_scale`` is above 1.
        size: (width, height) in pixels, exact.
        num_inference_steps: network evaluations per branch, 1 to 1000.
        true_cfg_scale: guidance by two forward passes; 1 switches it off.
        guidance_scale: embedded guidance of distilled models. The Qwen-Image family has none: there it sets
            ``true_cfg_scale`` when that is None, and is ignored, with a note, when it is not.
        seed: 0 to 2^63 - 1; the noise is drawn from it on the CPU.
        flow_shift: static schedule shift instead of the resolution-dependent one.

    Raises:
        RequestError: a field is empty, out of range or of the wrong type.
    """

    prompt: str
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    guidance_scale: float | None = None
    seed: int = 0
    flow_shift: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError(f"prompt must say what to make or change, got {self.prompt!r}")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise RequestError(f"negative_prompt must be text, got {self.negative_prompt!r}")
        _whole("seed", self.seed, 0, MAX_SEED)
        if self.num_inference_steps is not None:
            _whole("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        if self.true_cfg_scale is not None:
            _number("true_cfg_scale", self.true_cfg_scale, 1, 100)
        if self.guidance_scale is not None:
            _number("guidance_scale", self.guidance_scale, 0, 100)
        if self.flow_shift is not None:
            _number("flow_shift", self.flow_shift, 1e-3, 1e3)
        if self.size is not None:
            self._check_size(self.size)

    @staticmethod
    def _check_size(size: object) -> None:
        if not isinstance(size, tuple) or len(size) != 2:
            raise RequestError(f"size must be (width, height), got {size!r}")
        for name, side in zip(("width", "height"), size, strict=True):
            _whole(name, side, 1, MAX_SIDE_PIXELS)


@dataclass(frozen=True, kw_only=True)
class EditRequest(GenerateRequest):
    """A picture made from other pictures and text.

    Attributes:
        images: the pictures to edit, first to last ("Picture 1", "Picture 2", ...): files or PIL images of any size.
        reference: how the pictures act as references.
        keep: what of the first picture is kept as it was.
        denoise: share of the schedule that is run, from the first picture with noise on it; None starts from noise.
        resize_control: size at which the VAE sees the pictures: that of the output (``image``), the model's area
            (``official``), their own (``none``); None is the model's habit.

    Raises:
        RequestError: as :class:`GenerateRequest`, or there is no picture.
    """

    images: tuple[Image.Image | str | PathLike[str], ...]
    reference: Reference = Reference()
    keep: Keep = Keep()
    denoise: float | None = None
    resize_control: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.images, tuple) or not self.images:
            raise RequestError(f"images must be a tuple of at least one picture, got {self.images!r}")
        if not isinstance(self.reference, Reference) or not isinstance(self.keep, Keep):
            raise RequestError(f"reference and keep must be their options, got {self.reference!r} and {self.keep!r}")
        if len(self.reference.masks) not in (0, len(self.images)):
            raise RequestError(
                f"reference masks must be none or one per picture ({len(self.images)}), got {len(self.reference.masks)}"
            )
        if self.denoise is not None:
            _number("denoise", self.denoise, 0, 1)
        if self.resize_control not in (None, *RESIZE_CONTROLS):
            raise RequestError(
                f"resize_control must be one of {', '.join(RESIZE_CONTROLS)}, got {self.resize_control!r}"
            )
