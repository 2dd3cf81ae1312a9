"""What a user asks for, and nothing about how it is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from ..errors import RequestError
from .given import Given
from .keep.options import Keep
from .reference.options import Reference

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE_PIXELS = 8192
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
RESIZE_CONTROLS = ("image", "official", "none")
SCHEDULES = ("modern", "official9")
SIZE_RULES = ("pad", "floor16")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be from {low:g} to {high:g}, got {value:g}")


_RANGES = {
    "true_cfg_scale": (1, 100),
    "guidance_scale": (0, 100),
    "flow_shift": (1e-3, 1e3),
    "strength": (0, 1),
    "cfg_normalization": (0, 100),
    "cfg_truncation": (0, 1),
}
_WORDS = {"schedule": SCHEDULES, "size_rule": SIZE_RULES}


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A picture from text. Fields left None take the model's default (``qengine info MODEL`` prints them).

    Attributes:
        prompt: what to make; not empty.
        negative_prompt: what to steer away from; used when ``true_cfg_scale`` is above 1.
        size: (width, height) in pixels, exact.
        num_inference_steps: network evaluations per branch, 1 to 1000.
        true_cfg_scale: guidance by two forward passes; 1 switches it off.
        guidance_scale: of Z-Image: g of ``p + g (p - n)``, 0 switches it off. The Qwen-Image family has none: there it
            sets ``true_cfg_scale`` when that is None, and is ignored, with a note, when it is not.
        seed: 0 to 2^63 - 1; the noise is drawn from it on the CPU.
        flow_shift: static schedule shift instead of the model's own.
        init_image: picture to start from, with noise on it: a file or a PIL image of any size.
        strength: share of the schedule that is run from it, 0 to 1; None is 0.75. At 0 no step is run.
        schedule: of Z-Image: ``modern`` counts network evaluations; ``official9`` counts the points of the published
            list, of which the last is not evaluated.
        cfg_normalization: of Z-Image: longest guided velocity, in lengths of the prompt's; 0 for any.
        cfg_truncation: of Z-Image: model time above which the prompt runs alone; 1 for never.
        size_rule: ``pad`` makes any size to the pixel, padded inside; ``floor16`` rounds both sides down to 16.
        given: parts that are encoded already.

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
    init_image: Image.Image | str | PathLike[str] | None = None
    strength: float | None = None
    schedule: str | None = None
    cfg_normalization: float | None = None
    cfg_truncation: float | None = None
    size_rule: str | None = None
    given: Given | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise RequestError(f"prompt must say what to make or change, got {self.prompt!r}")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise RequestError(f"negative_prompt must be text, got {self.negative_prompt!r}")
        _whole("seed", self.seed, 0, MAX_SEED)
        if self.num_inference_steps is not None:
            _whole("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        for name, (low, high) in _RANGES.items():
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), low, high)
        for name, known in _WORDS.items():
            if getattr(self, name) not in (None, *known):
                raise RequestError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.size is not None:
            self._check_size(self.size)
        self._check_start()

    def _check_start(self) -> None:
        """What is said of the picture to start from, and of what is given, goes together."""
        if self.given is not None and not isinstance(self.given, Given):
            raise RequestError(f"given must be encoded parts (Given), got {type(self.given).__name__}")
        latents = self.given is not None and self.given.init is not None
        if self.strength is not None and self.init_image is None and not latents:
            raise RequestError("strength must stand beside init_image, got it alone", hint="name a picture")
        given_size = None if self.given is None else self.given.size
        rounded = self.size_rule == "floor16"
        if None not in (self.size, given_size) and self.size != given_size and not rounded:
            raise RequestError(f"size must be that of the given latents, {given_size}, got {self.size}")

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
        images: the pictures to edit, first to last ("Picture 1", "Picture 2", ...): files or PIL images of any size;
            none where their latents are given.
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
        latents = 0 if self.given is None else len(self.given.references)
        if not isinstance(self.images, tuple) or not (self.images or latents):
            raise RequestError(f"images must be a tuple of at least one picture, got {self.images!r}")
        if not isinstance(self.reference, Reference) or not isinstance(self.keep, Keep):
            raise RequestError(f"reference and keep must be their options, got {self.reference!r} and {self.keep!r}")
        if len(self.reference.masks) not in (0, len(self.images)):
            raise RequestError(
                f"reference masks must be none or one per picture ({len(self.images)}), got {len(self.reference.masks)}"
            )
        if not self.images and (self.keep != Keep() or any(self.reference.masks) or self.resize_control):
            raise RequestError(
                "images must be there where they are kept, masked or resized, got latents alone",
                hint="edit where the pictures are",
            )
        if self.init_image is not None or self.strength is not None:
            raise RequestError(
                "init_image and strength must be left out of an edit, which starts from its first picture",
                hint="denoise is the share of the schedule that is run from it",
            )
        if self.denoise is not None:
            _number("denoise", self.denoise, 0, 1)
        if self.resize_control not in (None, *RESIZE_CONTROLS):
            raise RequestError(
                f"resize_control must be one of {', '.join(RESIZE_CONTROLS)}, got {self.resize_control!r}"
            )
