"""What the flags say of references, masks, sizes and templates: the engine's own options, and the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine.keep.options import COMPOSITES, MASK_SAMPLINGS, Keep
from ..engine.presets import EDIT_TYPES, PRESETS, Settings, settle
from ..engine.prompts import fill
from ..engine.reference.options import METHODS, Reference
from ..engine.request import RESIZE_CONTROLS
from ..errors import RequestError
from .flag import Flag

REFERENCE = (
    Flag(
        name="--reference-method",
        also=("--reference_method",),
        metavar="METHOD",
        help=f"How the pictures act: {', '.join(METHODS)}; concat:0.5,inject switches at half of the steps.",
    ),
    Flag(
        name="--reference-strength",
        also=("--reference_strength",),
        metavar="S...",
        many=True,
        accepts=r"[0-9.][0-9.:,a-z_]*",
        help="0 to 2, 1 by default, for all pictures or one per picture: 0.7, a run over the steps 0.2:1.0[:ease_in], "
        "or one number per step 0.2,0.4,0.8. 0 is text to image.",
    ),
    Flag(
        name="--reference-mask",
        also=("--reference_mask",),
        metavar="FILE...",
        many=True,
        help="One per picture: only what is white of it is a reference.",
    ),
    Flag(name="--preset", choices=tuple(PRESETS), help="Method and strength by goal; flags beside it win."),
    Flag(
        name="--edit-type",
        also=("--edit_type",),
        choices=tuple(EDIT_TYPES),
        help="Method, strength and denoise by kind of edit; flags beside it win.",
    ),
    Flag(
        name="--denoise",
        kind="float",
        metavar="X",
        help="Share of the schedule that is run, from the first picture with noise on it; by default all of it.",
    ),
    Flag(
        name="--reference-strength-mode",
        choices=("gain", "latent"),
        help="default at other strengths than 1: ln s on the attention logits, or latents times s.",
    ),
    Flag(name="--cross-attn-rule", choices=("scale", "gain"), help="cross_attn: keys times s, or ln s on the logits."),
    Flag(name="--inject-gain", kind="float", metavar="X", help="Factor of what inject adds; 1 by default."),
    Flag(
        name="--inject-into", choices=("input", "state"), help="Where inject adds: what the network sees, or the run."
    ),
    Flag(
        name="--keep-vision-at-zero", kind="switch", help="The text encoder sees pictures of strength 0 all the same."
    ),
    Flag(name="--keep-frame-index", kind="switch", help="Pictures after one of strength 0 keep their place."),
    Flag(name="--negative-reference", choices=("on", "off"), help="Whether the negative branch sees the pictures; on."),
    Flag(name="--mask-vision", choices=("on", "off"), help="Whether the text encoder sees masked parts grey; on."),
)

CHAIN = (
    Flag(
        name="--stage",
        metavar="METHOD@STRENGTH...",
        many=True,
        accepts=r"[a-z_]+(@[0-9.][0-9.:,a-z_]*)?",
        help="Edit in stages, each of the picture before: default@0.4 inject@0.8 cross_attn@1.2.",
    ),
    Flag(
        name="--then",
        metavar="PROMPT",
        many=True,
        help="Go on from the result with this prompt, seed + 1; may be repeated.",
    ),
    Flag(name="--keep-original", kind="switch", help="Show the first picture to every stage as a second one."),
)
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
        name="--mask-sampling",
        choices=MASK_SAMPLINGS,
        help="How the mask becomes tokens: their mean, or musubi-tuner's four pixels at each middle.",
    ),
    Flag(
        name="--composite",
        choices=COMPOSITES,
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
    keep, how = _keep(values), _resize(values)
    settings = settle(**_reference(values))
    fields: dict[str, Any] = {} if settings == Settings(Reference()) else {"reference": settings.reference}
    fields |= {} if settings.denoise is None else {"denoise": settings.denoise}
    return fields | ({"keep": Keep(**keep)} if keep else {}) | ({} if how is None else {"resize_control": how})


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
    return fill(values["template"], fields)


def _field(word: str) -> tuple[str, str]:
    name, equals, text = word.partition("=")
    if not equals:
        raise RequestError(f"--fill must be FIELD=TEXT, got {word!r}")
    return name, text


def _reference(values: Mapping[str, Any]) -> dict[str, Any]:
    strengths = tuple(values["reference_strength"])
    given = {
        "preset": values["preset"],
        "edit_type": values["edit_type"],
        "method": values["reference_method"],
        "strength": strengths[0] if len(strengths) == 1 else strengths or None,
        "denoise": values["denoise"],
        "masks": tuple(values["reference_mask"]) or None,
        "mode": values["reference_strength_mode"],
        "cross_attn_rule": values["cross_attn_rule"],
        "inject_gain": values["inject_gain"],
        "inject_into": values["inject_into"],
        "keep_vision_at_zero": values["keep_vision_at_zero"] or None,
        "keep_frame_index": values["keep_frame_index"] or None,
        "negative": _switch(values["negative_reference"]),
        "mask_vision": _switch(values["mask_vision"]),
    }
    return {name: value for name, value in given.items() if value is not None}


def _switch(word: str | None) -> bool | None:
    return None if word is None else word == "on"


def _keep(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {name: name for name in ("mask", "mask_sampling", "rcm_sensitivity", "composite")}
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
