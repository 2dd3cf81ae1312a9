"""What the flags say of pictures as conditioning: the model that reads them, the knobs, and the blend with a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .flag import Flag
from .memory import budget_of

if TYPE_CHECKING:
    from ..engine.vl import BlendKnobs, Knobs, Recipe
    from ..engine.vl.memory import PlannedExtractor

RECIPES = (
    *("style_transfer", "style_transfer_adain", "style_transfer_text"),
    *("variation", "composition", "palette"),
)
BLENDS = (
    *("interpolate", "interpolate_area", "linear", "adain", "adain_global", "adain_per_dim"),
    *("style_only", "per_token"),
)
"""Blends of one extraction with a prompt; ``style_delta`` and ``attention_weighted`` need more, and Python."""
SELECTIONS = ("all", "image", "image_no_markers", "text")
NORMALISATIONS = ("global", "per_dim", "hybrid")
OUTLIER_MODES = ("none", "zero", "clamp", "scale")
DIRECTIONS = ("high", "low", "both")
SCALE_STATS = ("global", "robust")
CURVES = ("linear", "ease_in", "ease_out")
COMPRESSIONS = ("truncate", "interpolate", "pool", "attention_pool")

CONDITIONING = (
    Flag(
        name="--conditioning",
        also=("--vl-embeddings", "--vl_embeddings"),
        metavar="FILE",
        help="A .qx file of qengine extract, or its URL: what was read and encoded is taken from it, knobs anew.",
    ),
)
RECORDED_CONDITIONING = (
    Flag(name="--conditioning", metavar="FILE", help="Where the recorded .qx file is, if not beside the picture."),
)
VL = (
    Flag(
        name="--vl-model",
        also=("--vl_model", "--vl-model-path"),
        metavar="DIR",
        help="A Qwen3-VL folder, or the hub id of one that is here: it reads the pictures.",
    ),
    Flag(name="--vl-device", also=("--vl_device",), metavar="DEVICE", help="auto, cpu, cuda or cuda:N for --vl-model."),
    Flag(
        name="--vl-dtype",
        also=("--vl_dtype",),
        choices=("auto", "float32", "bfloat16", "fp32", "bf16"),
        help="Compute type of --vl-model; auto is float32 on a CPU and bfloat16 on CUDA.",
    ),
    Flag(
        name="--vl-weights", choices=("bf16", "int8", "fp8"), help="Weight format of --vl-model; bf16 is as computed."
    ),
    Flag(name="--text", metavar="TEXT", help="A description read after the pictures; it changes the text rows only."),
    Flag(name="--system-prompt", also=("--system_prompt",), metavar="TEXT", help="A system message before all."),
    Flag(name="--think", kind="switch", help="End the chat with an empty think block: four tokens more."),
    Flag(
        name="--mask-tokens",
        kind="int",
        metavar="N...",
        many=True,
        accepts=r"\d+",
        help="Image tokens, counted from 0 over all pictures, that no other token sees.",
    ),
    Flag(name="--mask-mode", choices=("attention", "remove"), help="Keep the rows of masked tokens, or drop them."),
)

KNOBS = (
    Flag(
        name="--hidden-layer",
        also=("--hidden_layer", "--vl-hidden-layer"),
        metavar="N[:W]...",
        many=True,
        accepts=r"-?\d+(:[0-9.]+)?",
        help="-1 (after the final norm) to minus the model's layers; -6 when not given. -2:0.7 -6:0.3 is a mean.",
    ),
    Flag(
        name="--token-selection",
        also=("--vl-token-selection",),
        choices=SELECTIONS,
        help="Rows that are kept: all, image (with its markers), image_no_markers, text.",
    ),
    Flag(
        name="--image-tokens-only",
        also=("--image_tokens_only", "--vl-image-tokens-only"),
        kind="switch",
        help="As --token-selection image.",
    ),
    Flag(
        name="--text-tokens-only",
        also=("--text_tokens_only", "--vl-text-tokens-only"),
        kind="switch",
        help="As --token-selection text.",
    ),
    Flag(name="--scale-to-text", choices=("on", "off"), help="Normalise at all; on."),
    Flag(
        name="--target-std",
        also=("--target_std", "--vl-target-std"),
        metavar="X|auto",
        help="Standard deviation after global scaling; 70. auto takes the prompt's.",
    ),
    Flag(
        name="--normalization-mode",
        also=("--normalization_mode", "--normalization", "--vl-normalization"),
        choices=NORMALISATIONS,
        help="global scales all alike, per_dim takes each column's mean and std from --vl-statistics, hybrid mixes.",
    ),
    Flag(name="--scale-stat", choices=SCALE_STATS, help="What global measures: the std, or the median row's size."),
    Flag(name="--clip-sigma", metavar="X|none", help="Clamp of per_dim in standard deviations; 3."),
    Flag(name="--hybrid-weight", kind="float", metavar="X", help="Share of per_dim in hybrid; 0.5."),
    Flag(
        name="--outlier-masking",
        also=("--outlier_masking", "--vl-outlier-masking"),
        choices=OUTLIER_MODES,
        help="What is done to columns of image rows that stand out against --vl-statistics; none.",
    ),
    Flag(
        name="--outlier-threshold",
        also=("--outlier_threshold", "--vl-outlier-threshold"),
        kind="float",
        metavar="X",
        help="Ratio to the reference above which a column stands out; 10.",
    ),
    Flag(name="--outlier-direction", choices=DIRECTIONS, help="Too large, too small, or both; high."),
    Flag(
        name="--vl-statistics",
        metavar="FILE",
        help="Reference statistics made by qengine stats; those in the cache when not given.",
    ),
)

BLEND = (
    Flag(name="--alpha", also=("--vl-alpha",), kind="float", metavar="X", help="Share of the picture, 0 to 1; 0.3."),
    Flag(
        name="--blend",
        also=("--blend-mode", "--vl-blend-mode"),
        choices=BLENDS,
        help="How picture and prompt become one; interpolate brings the picture's rows to the prompt's number.",
    ),
    Flag(name="--protect-first-token", kind="switch", help="Keep the prompt's first row, the attention sink."),
    Flag(name="--start-alpha", kind="float", metavar="X", help="per_token: the share at the first token; 0."),
    Flag(name="--alpha-curve", choices=CURVES, help="per_token: from --start-alpha to --alpha; linear."),
    Flag(
        name="--token-alphas",
        kind="float",
        metavar="X...",
        many=True,
        accepts=r"[0-9.]+",
        help="per_token: one share per token of the prompt.",
    ),
    Flag(
        name="--compress",
        choices=COMPRESSIONS,
        help="How more rows than the transformer takes (1504) become fewer; interpolate.",
    ),
    Flag(name="--vl-preset", choices=RECIPES, help="Settings by goal; flags beside it win."),
)


def said_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags in :data:`KNOBS` and :data:`BLEND` say, as fields of ``Knobs`` and ``BlendKnobs``; no defaults.

    Raises:
        RequestError: a word cannot be read, or the token selection is given twice.
    """
    found = _preset(values)
    names = ("scale_stat", "normalization_mode", "hybrid_weight", "alpha", "start_alpha", "vl_statistics")
    names += ("outlier_masking", "outlier_threshold", "outlier_direction")
    fields = {name: name for name in names} | {"blend": "mode", "alpha_curve": "curve", "compress": "compression"}
    fields |= {"vl_statistics": "statistics"}
    found |= {field: values[name] for name, field in fields.items() if values[name] is not None}
    if values["hidden_layer"]:
        found["hidden_layer"] = layers_of(values["hidden_layer"])
    if values["scale_to_text"] is not None:
        found["scale_to_text"] = values["scale_to_text"] == "on"
    if values["protect_first_token"]:
        found["protect_first_token"] = True
    if values["token_alphas"]:
        found |= {"alphas": tuple(values["token_alphas"]), "mode": values["blend"] or "per_token"}
    found |= _selection(values)
    return found | _number_or(values, "target_std", "auto", "auto") | _number_or(values, "clip_sigma", "none", None)


def knobs_of(values: Mapping[str, Any], base: Knobs | None = None) -> Knobs:
    """The way from hidden states to embeddings.

    Args:
        values: of the flags in :data:`KNOBS` and :data:`BLEND`.
        base: what holds where neither a flag nor the preset says anything; None takes the defaults.

    Raises:
        RequestError: a value is out of range, or the token selection is given twice.
    """
    from ..engine.vl import Knobs

    return _replaced(base or Knobs(), said_of(values))


def blend_of(values: Mapping[str, Any], alpha: float | None = None, base: BlendKnobs | None = None) -> BlendKnobs:
    """The way from embeddings to conditioning.

    Args:
        values: of the flags in :data:`KNOBS` and :data:`BLEND`.
        alpha: instead of ``--alpha``, for a sweep.
        base: what holds where neither a flag nor the preset says anything; None takes the defaults.

    Raises:
        RequestError: a value is out of range.
    """
    from ..engine.vl import BlendKnobs

    return _replaced(base or BlendKnobs(), said_of(values) | ({} if alpha is None else {"alpha": alpha}))


def recipe_of(values: Mapping[str, Any]) -> Recipe | None:
    """The preset that is named, with its strength and steps for the run; None where none is."""
    from ..engine.vl import recipe

    return None if values["vl_preset"] is None else recipe(values["vl_preset"])


def layers_of(words: Sequence[str]) -> Any:
    """``("-6",)`` as -6, ``("-2:0.7", "-6:0.3")`` as {-2: 0.7, -6: 0.3}; bare layers weigh the same.

    Raises:
        RequestError: a word is neither, or names a layer twice.
    """
    found: dict[int, float] = {}
    for word in words:
        layer, _, weight = word.partition(":")
        try:
            number, share = int(layer), float(weight or 1)
        except ValueError as error:
            raise RequestError(f"--hidden-layer must be a layer, or layer:weight, got {word!r}") from error
        if number in found:
            raise RequestError(f"--hidden-layer must name each layer once, got {number} twice")
        found[number] = share
    return next(iter(found)) if len(found) == 1 else found


def open_extractor(values: Mapping[str, Any]) -> PlannedExtractor:
    """The model that reads pictures, as the flags in :data:`VL` say.

    Raises:
        RequestError: no model is named.
        CheckpointError: it is missing, incomplete or of another kind.
        DeviceError: the device is not there.
    """
    from ..engine.vl.memory import open_planned

    if values["vl_model"] is None:
        raise RequestError("a model that reads pictures must be named, got none", hint="--vl-model DIR of a Qwen3-VL")
    return open_planned(
        values["vl_model"],
        values["vl_device"] or "auto",
        values["vl_dtype"] or "auto",
        budget=budget_of(values),
        weight_format=values["vl_weights"] or "bf16",
        offload=values["offload"] or "auto",
    )


def told(extractor: PlannedExtractor, values: Mapping[str, Any]) -> tuple[str, ...]:
    """What should be heard of a pass: its plan where ceilings or an offload were asked for, and every retry."""
    asked = any(values[name] is not None for name in ("vram", "ram", "offload"))
    return (*(extractor.plan.notes if asked and extractor.plan is not None else ()), *extractor.told)


def _preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the preset, so that it replaces whatever a file says."""
    said = recipe_of(values)
    if said is None:
        return {}
    return {field.name: getattr(part, field.name) for part in (said.knobs, said.blend) for field in fields_of(part)}


def _selection(values: Mapping[str, Any]) -> dict[str, Any]:
    words = values["image_tokens_only"], values["text_tokens_only"], values["token_selection"]
    if not any(words):
        return {}
    from ..engine.vl.knobs import select_tokens

    return {"token_selection": select_tokens(*words)}


def _replaced(base: Any, found: Mapping[str, Any]) -> Any:
    known = {field.name for field in fields_of(base)}
    return replace(base, **{name: value for name, value in found.items() if name in known})


def _number_or(values: Mapping[str, Any], name: str, word: str, meaning: Any) -> dict[str, Any]:
    text = values[name]
    if text is None:
        return {}
    if text == word:
        return {name: meaning}
    try:
        return {name: float(text)}
    except ValueError as error:
        raise RequestError(f"--{name.replace('_', '-')} must be a number or {word}, got {text!r}") from error
