"""What the flags say of memory and kernels: the engine's own ``Budget`` and ``Choices``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from . import backend

if TYPE_CHECKING:
    from ..engine.plan import Budget, Choices


NAMES = ("vram", "ram", "weights", "text_encoder_weights", "fp8_scaled", "fp8_vl", "blocks_to_swap", "offload")
NAMES += ("text_encoder_cpu", "vae_tile", "vae_weights", "packed", "attn_mode", "kernel")


def memory_choice(values: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``budget``, ``choices`` and ``packed`` for ``Engine.open``; nothing where nothing is said of memory or kernels.

    Args:
        values: of the flags.
        recorded: values that stand in where no flag is given: those of the run that is repeated.

    Raises:
        RequestError: as :func:`budget_of` and :func:`choices_of`.
        CheckpointError: ``--packed`` names no packed file.
    """
    given = {name: value for name in NAMES if (value := values.get(name)) is not None and value is not False}
    if not given.get("kernel", True):
        del given["kernel"]
    if "packed" in given and not {"weights", "fp8_scaled"} & given.keys():
        given["weights"] = backend.packed_format(Path(str(given["packed"])))
    known = _beside(recorded or {}, given) | given
    if not known:
        return {}
    choice = {"budget": budget_of(known), "choices": choices_of(known)}
    return {**choice, "packed": known["packed"]} if "packed" in known else choice


def _beside(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded values that no flag replaces under another spelling.

    A pin on linear layers is of the recorded weight format, so it goes where a flag names another.
    """
    replaced = {"weights": "fp8_scaled", "text_encoder_weights": "fp8_vl"}
    kept = {name: value for name, value in recorded.items() if replaced.get(name) not in given}
    formats = {"weights", "text_encoder_weights", "fp8_scaled", "fp8_vl"} & given.keys()
    if formats and "kernel" in kept:
        kept["kernel"] = tuple(pin for pin in kept["kernel"] if "linear" not in pin.partition("=")[0])
    return kept


def budget_of(values: Mapping[str, Any]) -> Budget:
    """``--vram`` and ``--ram``; None where they are not given.

    Raises:
        RequestError: one of them is no size.
    """
    from ..engine.plan import Budget, parse_size

    sizes = {name: values.get(name) for name in ("vram", "ram")}
    return Budget(**{f"{name}_bytes": None if size is None else parse_size(size) for name, size in sizes.items()})


def choices_of(values: Mapping[str, Any]) -> Choices:
    """How the weights are to be held, and what computes.

    Raises:
        RequestError: a format or an op is named twice and differently, or a value is out of range.
    """
    from ..engine.plan import Choices

    given = {
        "weights": _format(values, "weights", "fp8_scaled", "--fp8_scaled"),
        "text_encoder_weights": _format(values, "text_encoder_weights", "fp8_vl", "--fp8_vl"),
        "text_encoder_cpu": values.get("text_encoder_cpu") or None,
        "attention": values.get("attn_mode"),
        "kernels": pins(values.get("kernel") or ()) or None,
        **{name: values.get(name) for name in ("blocks_to_swap", "offload", "vae_tile", "vae_weights")},
    }
    return Choices(**{name: value for name, value in given.items() if value is not None})


def pins(words: Sequence[str]) -> dict[str, str]:
    """``OP=NAME`` words as a mapping.

    Raises:
        RequestError: a word is of another form, or an op is named twice and differently.
    """
    found: dict[str, str] = {}
    for word in words:
        op, equals, name = word.partition("=")
        if not (op and equals and name):
            raise RequestError(f"--kernel must be OP=NAME, got {word!r}", hint="--kernel guidance=reference")
        if found.setdefault(op, name) != name:
            raise RequestError(f"--kernel must name {op} once, got {found[op]} and {name}")
    return found


def _format(values: Mapping[str, Any], name: str, switch: str, spelling: str) -> str | None:
    chosen = values.get(name)
    if not values.get(switch):
        return chosen
    if chosen not in (None, "fp8"):
        flag = "--" + name.replace("_", "-")
        raise RequestError(f"{flag} must be fp8 beside {spelling}, got {chosen}", hint="leave one of them out")
    return "fp8"
