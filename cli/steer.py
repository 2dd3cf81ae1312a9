"""What the flags say of masks, sizes and templates: the engine's own ``Keep``, and the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RequestError
from .flag import Flag

RESIZE_CONTROLS = ("image", "official", "none")

KEEP = (
    Flag(
        name="--mask",
        also=("--mask_path",),
        metavar="FILE",
        help="White is what may change, and so is what is transparent; the rest stays to the bit.",
    ),
    Flag(name="--rcm", kind="switch", help="Find the region of change while the run goes on, and keep the rest."),
    Flag(name="--rcm-sensitivity", kind="float", metavar="X", help="0 to 1: how small a difference counts; 0.5."),
    Flag(
        name="--rcm-threshold",
        also=("--rcm_threshold",),
        kind="float",
        metavar="X",
        help="musubi-tuner's region change mask: difference of latents above which a token changes.",
    ),
    Flag(
        name="--rcm-relative-threshold",
        also=("--rcm_relative_threshold",),
        kind="switch",
        help="--rcm-threshold is a share of the largest difference of each step.",
    ),
    Flag(name="--rcm-kernel-size", also=("--rcm_kernel_size",), kind="int", metavar="N", help="Of its blur; 3."),
    Flag(name="--rcm-dilate-size", also=("--rcm_dilate_size",), kind="int", metavar="N", help="Tokens it grows by; 0."),
    Flag(
        name="--rcm-debug-save",
        also=("--rcm_debug_save",),
        kind="switch",
        help="Write the mask of every step beside the result, one PNG each.",
    ),
    Flag(
        name="--composite",
        choices=("auto", "pixels", "latents", "none"),
        help="What is put back at the end; pixels, and none for musubi-tuner's thresholds.",
    ),
    Flag(name="--feather", kind="int", metavar="N", help="Pixels of soft edge inside the mask; 8."),
)
SIZES = (
    Flag(
        name="--resize-control",
        choices=RESIZE_CONTROLS,
        help="Size at which the VAE sees the pictures: the output's, the model's area, or their own.",
    ),
    Flag(
        name="--resize-control-to-image-size",
        also=("--resize_control_to_image_size",),
        kind="switch",
        help="As --resize-control image.",
    ),
    Flag(
        name="--resize-control-to-official-size",
        also=("--resize_control_to_official_size",),
        kind="switch",
        help="As --resize-control official.",
    ),
)
TEMPLATE = (
    Flag(name="--template", metavar="NAME", help="Make the prompt from a template of qengine hints."),
    Flag(
        name="--fill",
        metavar="FIELD=TEXT...",
        many=True,
        accepts=r"[a-z_]+=.*",
        help="A field of the template.",
    ),
)


def steering(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an edit request beside prompt, size and schedule; nothing where nothing is said.

    Raises:
        RequestError: flags contradict each other, or a value is out of range.
    """
    from ..engine.keep.options import Keep

    keep, how = _keep(values), _resize(values)
    return ({"keep": Keep(**keep)} if keep else {}) | ({} if how is None else {"resize_control": how})


def prompt_of(values: Mapping[str, Any]) -> str | None:
    """The prompt of a template, or None where none is named.

    Raises:
        RequestError: a field is missing, or there are fields without a template.
    """
    fields = dict(_field(word) for word in values["fill"])
    if values["template"] is None:
        if fields:
            raise RequestError("--fill must stand beside --template, got none", hint="qengine hints lists templates")
        return None
    if values["prompt"] is not None:
        raise RequestError("prompt must be given once, got --prompt and --template")
    from ..engine.prompts import fill

    return fill(values["template"], fields)


def _field(word: str) -> tuple[str, str]:
    name, equals, text = word.partition("=")
    if not equals:
        raise RequestError(f"--fill must be FIELD=TEXT, got {word!r}")
    return name, text


def _keep(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: name for name in ("mask", "rcm_sensitivity", "composite")}
    names |= {"rcm_kernel_size": "rcm_kernel_size", "rcm_dilate_size": "rcm_dilate_size", "feather": "feather_pixels"}
    given = {field: values[name] for name, field in names.items() if values[name] is not None}
    return given | ({"rcm": True} if values["rcm"] else {}) | _threshold(values)


def _threshold(values: Mapping[str, Any]) -> dict[str, float]:
    """musubi-tuner's threshold, which a switch makes relative."""
    threshold, relative = values["rcm_threshold"], values["rcm_relative_threshold"]
    if threshold is None:
        if relative:
            raise RequestError(
                "--rcm_relative_threshold must stand beside --rcm_threshold, got none", hint="0.1 to 0.5"
            )
        return {}
    return {"rcm_relative_threshold" if relative else "rcm_threshold": threshold}


def _resize(values: Mapping[str, Any]) -> str | None:
    said = {
        "--resize-control": values["resize_control"],
        "--resize_control_to_image_size": "image" if values["resize_control_to_image_size"] else None,
        "--resize_control_to_official_size": "official" if values["resize_control_to_official_size"] else None,
    }
    named = {flag: how for flag, how in said.items() if how is not None}
    if len(set(named.values())) > 1:
        raise RequestError(f"the size of the pictures must be told once, got {' and '.join(named)}")
    return next(iter(named.values()), None)
