"""Settings of a run from a job file: what is said now, then what the file says, then the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...errors import RequestError
from ..request import GenerateRequest
from ..vl import BlendKnobs, Knobs
from .job import JobFile

KNOB_NAMES = frozenset(field.name for field in fields(Knobs))
BLEND_NAMES = frozenset(field.name for field in fields(BlendKnobs))
REQUEST_NAMES = frozenset(field.name for field in fields(GenerateRequest)) - {"given"} | {"denoise"}


@dataclass(frozen=True)
class Settings:
    """What a run from a job file is made with.

    Attributes:
        fields: of the request, without what is given.
        knobs: from hidden states to embeddings.
        blend: from embeddings to conditioning.
        statistics: file of reference statistics; None takes those in the cache.
    """

    fields: Mapping[str, Any]
    knobs: Knobs
    blend: BlendKnobs
    statistics: str | Path | None = None


def settle(job: JobFile, values: Mapping[str, Any]) -> Settings:
    """The settings of a job under values that win over it.

    Raises:
        RequestError: a name is unknown, or a value out of range.
    """
    said = {name: value for name, value in values.items() if value is not None or name in KNOB_NAMES | BLEND_NAMES}
    said = {**job.render, **said}
    unknown = sorted(said.keys() - KNOB_NAMES - BLEND_NAMES - REQUEST_NAMES - {"statistics"})
    if unknown:
        raise RequestError(f"settings of a job must be fields of a request or of its knobs, got {', '.join(unknown)}")
    asked = {name: said[name] for name in REQUEST_NAMES & said.keys() if said[name] is not None}
    if "size" in asked:
        asked["size"] = tuple(asked["size"])
    return Settings(
        asked,
        replace(job.knobs, **knob_values({name: said[name] for name in KNOB_NAMES & said.keys()})),
        replace(job.blend, **knob_values({name: said[name] for name in BLEND_NAMES & said.keys()})),
        said.get("statistics"),
    )


def knob_values(words: Mapping[str, Any]) -> dict[str, Any]:
    """Values of knobs as JSON says them: layers with weights have text for keys, and shares are a list.

    Raises:
        ValueError: a layer is no number.
    """
    found = dict(words)
    if isinstance(found.get("hidden_layer"), Mapping):
        found["hidden_layer"] = {int(layer): float(weight) for layer, weight in found["hidden_layer"].items()}
    if found.get("alphas") is not None:
        found["alphas"] = tuple(found["alphas"])
    return found


def knob_words(knobs: Knobs | BlendKnobs) -> dict[str, Any]:
    """Knobs as JSON values; :func:`knob_values` reads them back."""
    words = {field.name: getattr(knobs, field.name) for field in fields(knobs)}
    if isinstance(words.get("hidden_layer"), Mapping):
        words["hidden_layer"] = {str(layer): weight for layer, weight in words["hidden_layer"].items()}
    if words.get("alphas") is not None:
        words["alphas"] = list(words["alphas"])
    return words
