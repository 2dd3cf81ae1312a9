"""What of the picture is kept as it was: a mask, or the region change mask of a run. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from ...errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

COMPOSITES = ("auto", "pixels", "latents", "none")
MASK_SAMPLINGS = ("area", "bilinear")
MAX_KERNEL_SIZE = 31
MAX_DILATE_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Options of what is kept.

    Attributes:
        mask: white where a change is asked; soft values blend.
        mask_sampling: how the mask becomes shares of tokens: their mean (``area``), or musubi-tuner's ``bilinear``,
            that looks at the four pixels about each token's middle and misses thin strokes.
        rcm: find the region of change while the run goes on, and keep the rest; our rule, set by ``rcm_sensitivity``.
        rcm_sensitivity: 0 to 1, how small a difference counts as change.
        rcm_threshold: difference of latents above which a token changes; musubi-tuner's rule to the bit.
        rcm_relative_threshold: the same as a share of the largest difference of the step.
        rcm_kernel_size: of the Gaussian blur; even sizes are made odd, 1 and below blur nothing.
        rcm_dilate_size: tokens by which the region grows on each side.
        composite: what is put back at the end: ``pixels`` of the input picture (and its latents), ``latents`` alone,
            ``none``; ``auto`` is ``pixels``, and ``none`` for musubi-tuner's rule.
        feather_pixels: width of the soft edge, wholly inside the region of change.

    Raises:
        RequestError: values out of range, or two rules at once.
    """

    mask: Image.Image | str | PathLike[str] | None = None
    mask_sampling: str = "area"
    rcm: bool = False
    rcm_sensitivity: float = 0.5
    rcm_threshold: float | None = None
    rcm_relative_threshold: float | None = None
    rcm_kernel_size: int = 3
    rcm_dilate_size: int = 0
    composite: str = "auto"
    feather_pixels: int = 8

    def __post_init__(self) -> None:
        rules = {
            "mask": self.mask is not None,
            "rcm": self.rcm,
            "rcm_threshold": self.rcm_threshold is not None,
            "rcm_relative_threshold": self.rcm_relative_threshold is not None,
        }
        named = [name for name, given in rules.items() if given]
        if len(named) > 1:
            raise RequestError(
                f"what is kept must be told in one way, got {' and '.join(named)}",
                hint="--mask where you know the region, --rcm where you do not",
            )
        if self.composite not in COMPOSITES:
            raise RequestError(f"composite must be one of {', '.join(COMPOSITES)}, got {self.composite!r}")
        if self.mask_sampling not in MASK_SAMPLINGS:
            raise RequestError(f"mask_sampling must be one of {', '.join(MASK_SAMPLINGS)}, got {self.mask_sampling!r}")
        _number("rcm_sensitivity", self.rcm_sensitivity, 0, 1)
        _number("rcm_threshold", self.rcm_threshold, 0, 1e6)
        _number("rcm_relative_threshold", self.rcm_relative_threshold, 0, 1)
        _number("rcm_kernel_size", self.rcm_kernel_size, 0, MAX_KERNEL_SIZE)
        _number("rcm_dilate_size", self.rcm_dilate_size, 0, MAX_DILATE_SIZE)
        _number("feather_pixels", self.feather_pixels, 0, 1024)

    @property
    def rule(self) -> str | None:
        """``mask``, ``rcm`` (ours), ``musubi`` (its thresholds), or None where nothing is kept."""
        if self.mask is not None:
            return "mask"
        if self.rcm_threshold is not None or self.rcm_relative_threshold is not None:
            return "musubi"
        return "rcm" if self.rcm else None

    @property
    def put_back(self) -> str:
        """What is put back at the end, ``auto`` decided: ``pixels``, ``latents`` or ``none``."""
        if self.composite != "auto":
            return self.composite
        return "pixels" if self.rule in ("mask", "rcm") else "none"

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values; the mask is left to the caller."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "mask"}
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in plain.items() if value != defaults[name]}


def _number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
