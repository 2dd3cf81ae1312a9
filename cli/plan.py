"""``qengine plan``: what a run would take and how it would be carried out, from headers alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, InputError, RequestError
from . import backend, machine
from .memory import budget_of, choices_of
from .order import SINGLE_FILES, check_files, device_choice, model_choice, request_fields
from .zimage import starting

if TYPE_CHECKING:
    from ..engine.plan import Budget, DeviceFacts, JobFacts
    from ..loaders.source import ModelSource

STARTING = (
    *("init_image", "strength", "guidance_scale"),
    *("schedule", "cfg_normalization", "cfg_truncation", "size_rule"),
)
HYPOTHETICAL_ARCHITECTURE = 86
HYPOTHETICAL_VRAM_BYTES = 1 << 50
CONTEXT_BYTES = 500 << 20
"""What the driver takes for a process on the cards that were measured; where a card is here, it is measured."""


def show(words: Sequence[str], values: Mapping[str, Any]) -> int:
    """Print the plan of a request; returns the exit code.

    Raises:
        RequestError: not exactly one model is named, or flags contradict each other.
        PlanError: the request does not fit.
    """
    from ..engine.plan import ModelFacts, make_plan
    from ..engine.plan.words import as_json, as_text

    if values["extractor"] is not None:
        from .plan_extractor import show as show_extractor

        return show_extractor(words, values)
    budget, choices = budget_of(values), choices_of(values)
    source = backend.open_source(**model_choice({**values, "model": _model(words, values)}))
    backend.defaults_of(source)
    facts = ModelFacts.of(source)
    job = _job(source, facts.multiple, values)
    device, said = device_facts(values, budget, lambda place: backend.facts_for(place, facts, job, choices))
    plan = make_plan(facts, job, budget, device, choices)
    data = as_json(plan)
    data["notes"] = [*source.notes, *said, *data["notes"]]
    if values["json"]:
        print(json.dumps(data, indent=2))
    else:
        text = as_text(plan, explain=values["explain"] or values["verbose"])
        print("\n".join([*(f"note: {note}" for note in (*source.notes, *said)), text]))
    return 0


def device_facts(
    values: Mapping[str, Any], budget: Budget, measured: Callable[[str], DeviceFacts]
) -> tuple[DeviceFacts, tuple[str, ...]]:
    """The device to plan for, and what was assumed of it.

    A CPU, a card that is here (only that needs torch), or a card that is not: where ``--architecture`` is given, or
    ``--vram`` on a machine without one.

    Args:
        values: of the flags.
        budget: ceilings.
        measured: the facts of a card that is here, by its name.

    Raises:
        DeviceError: ``--device cuda`` is asked, no card is here, and ``--vram`` does not say which to imagine.
    """
    device = device_choice(values)["device"]
    cards = machine.cards()
    if values["architecture"] is not None or (not cards and device != "cpu" and budget.vram_bytes is not None):
        return _imagined(values["architecture"] or HYPOTHETICAL_ARCHITECTURE, budget)
    if device.startswith("cuda") and not cards:
        raise DeviceError(f"--device must be here, got {device} and no card", hint="--vram 12GiB --architecture 86")
    if device == "cpu" or not cards:
        return _host(), ()
    return measured("cuda" if device == "auto" else device), ()


def _imagined(architecture: int, budget: Budget) -> tuple[DeviceFacts, tuple[str, ...]]:
    from ..engine.plan import DeviceFacts

    total = budget.vram_bytes or HYPOTHETICAL_VRAM_BYTES
    facts = DeviceFacts(
        kind="cuda",
        name=f"a card of architecture {architecture}",
        architecture=architecture,
        total_bytes=total,
        free_bytes=total,
        context_bytes=CONTEXT_BYTES,
        host_total_bytes=_free_ram(),
        host_free_bytes=_free_ram(),
    )
    return facts, (
        f"planned for a card that is not here: architecture {architecture}, 500 MiB for its context, every kernel and "
        "library for it installed and working",
    )


def _host() -> DeviceFacts:
    from ..engine.measure import host_facts

    _free_ram()
    return host_facts()


def _free_ram() -> int:
    free = machine.free_memory_bytes()
    if free is None:
        raise RequestError("--ram must be given here, got none and the system does not say what is free")
    return free


def _model(words: Sequence[str], values: Mapping[str, Any]) -> str | None:
    files = any(values[name] for name in SINGLE_FILES)
    if len(words) != (0 if files else 1):
        got = f"{len(words)} beside --dit" if files else len(words)
        raise RequestError(
            f"plan must get one model, got {got}", hint="qengine plan MODEL --ref photo.jpg --vram 12GiB"
        )
    return None if files else words[0]


def _job(source: ModelSource, multiple: int, values: Mapping[str, Any]) -> JobFacts:
    from ..engine.plan import foresee

    pictures = [Path(name) for name in values["ref"]]
    check_files(pictures)
    fields = {"prompt": values["prompt"], **request_fields(values), **starting(values)}
    init, defaults = fields.get("init_image"), backend.defaults_of(source)
    if init is not None:
        check_files([init])
        fields["init_size"] = size_of(init)
    return foresee(
        defaults,
        [size_of(path) for path in pictures],
        fields,
        source.processor_config,
        multiple=multiple,
        dtype={"fp32": "float32", "bf16": "bfloat16"}.get(values["dtype"], values["dtype"] or "auto"),
        words=_words(source, pictures, values),
    )


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is shown, from its header."""
    from PIL import Image

    sideways = (5, 6, 7, 8)
    orientation_tag = 0x0112
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(orientation_tag) in sideways
    except OSError as error:
        raise InputError(f"{path} must be a picture, got: {error}") from error
    return (height, width) if turned else (width, height)


def _words(source: ModelSource, pictures: Sequence[Path], values: Mapping[str, Any]) -> str:
    """The request as it would be typed; a photo and a prompt stand in where none are given."""
    makes = backend.defaults_of(source).max_references == 0
    prompt = values["prompt"] or ("a red bicycle" if makes else "make it night")
    words = ["generate"] if makes else ["edit", *(map(str, pictures) if pictures else ["photo.jpg"])]
    words.append(prompt)
    for key in ("size", "steps", "true_cfg_scale", "dtype", *STARTING):
        if values[key] is not None:
            said = values[key]
            words += ["--" + key.replace("_", "-"), f"{said:g}" if isinstance(said, float) else str(said)]
    if values["negative_prompt"] is not None:
        words += ["--negative-prompt", values["negative_prompt"]]
    if values["image_size"] is not None:
        words += ["--image-size", *values["image_size"].replace(",", " ").split()]
    return shlex.join(words)
