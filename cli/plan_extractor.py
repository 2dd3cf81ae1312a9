"""``qengine plan --extractor``: what reading pictures would take, from headers alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from .blend import layers_of
from .memory import budget_of
from .order import check_files

if TYPE_CHECKING:
    from ..engine.plan import DeviceFacts, Extraction, ExtractorFacts

DEFAULT_LAYER = -6
DEFAULT_SIDE = 1024
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def show(words: Sequence[str], values: Mapping[str, Any]) -> int:
    """Print the plan of an extraction; returns the exit code.

    Raises:
        RequestError: a model is named as well, or flags contradict each other.
        CheckpointError: the folder holds no usable Qwen3-VL.
        PlanError: it does not fit.
    """
    from ..engine.plan import Choices, ExtractorFacts, plan_extraction
    from ..engine.plan.words import extractor_json, extractor_text
    from ..loaders.vl import open_vl
    from .plan import device_facts

    if words:
        raise RequestError(
            f"plan must get one model, got {words[0]} beside --extractor", hint="plan them one after the other"
        )
    budget, facts = budget_of(values), ExtractorFacts.of(open_vl(values["extractor"]))
    job = _job(facts, values)
    choices = Choices(text_encoder_weights=values["vl_weights"] or "bf16", offload=values["offload"] or "auto")
    device, said = device_facts({**values, "device": values["vl_device"] or values["device"]}, budget, _measured)
    plan = plan_extraction(facts, job, budget, device, choices)
    if values["json"]:
        data = extractor_json(plan)
        print(json.dumps({**data, "notes": [*said, *data["notes"]]}, indent=2))
    else:
        print("\n".join([*(f"note: {note}" for note in said), extractor_text(plan)]))
    return 0


def _measured(device: str) -> DeviceFacts:
    from ..engine.components import pick_device
    from ..engine.measure import device_facts

    return device_facts(pick_device(device))


def _job(facts: ExtractorFacts, values: Mapping[str, Any]) -> Extraction:
    from ..engine.plan import Extraction
    from .plan import size_of

    pictures = [Path(name) for name in values["ref"]]
    check_files(pictures)
    layers = layers_of(values["hidden_layer"]) if values["hidden_layer"] else DEFAULT_LAYER
    return Extraction.foresee(
        facts,
        [size_of(path) for path in pictures] or [(DEFAULT_SIDE, DEFAULT_SIDE)],
        text=values["text"],
        system_prompt=values["system_prompt"],
        layers=_checked(layers if isinstance(layers, Mapping) else [layers], len(facts.stack.blocks)),
        masked=bool(values["mask_tokens"]),
        dtype=DTYPES.get(values["vl_dtype"], values["vl_dtype"] or "auto"),
        words=_words(pictures, values),
    )


def _checked(layers: Any, count: int) -> list[int]:
    found = [int(layer) for layer in layers]
    wrong = [layer for layer in found if not -count <= layer <= -1]
    if wrong:
        raise RequestError(f"hidden_layer must be -1 to -{count}, got {wrong[0]}")
    return found


def _words(pictures: Sequence[Path], values: Mapping[str, Any]) -> str:
    """The extraction as it would be typed; a photo stands in where none is given."""
    words = ["extract", "--image", *(map(str, pictures) if pictures else ["photo.jpg"])]
    for key, flag in (("text", "--text"), ("system_prompt", "--system-prompt")):
        if values[key] is not None:
            words += [flag, values[key]]
    for key, flag in (("hidden_layer", "--hidden-layer"), ("mask_tokens", "--mask-tokens")):
        if values[key]:
            words += [flag, *map(str, values[key])]
    return shlex.join([*words, "-o", "job.qx"])
