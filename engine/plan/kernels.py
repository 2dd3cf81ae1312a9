"""Which implementation of every op a run uses: what is pinned, else the first that can run; decided once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile

from ...errors import KernelError, RequestError
from ...kernels.dispatch import Machine, choose, definition, reasons
from ..formats import QUANTISED
from ..layout import ITEM_BYTES
from .activations import CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS, Linear
from .budget import Choices
from .facts import DeviceFacts, Shape, Stack
from .jobs import JobFacts
from .model import ModelFacts
from .rules import Formats, pick_formats

FIXED = {"cpu": {"vae.attention": "torch", "vae.convolution": "torch"}}
FIXED["cuda"] = {**FIXED["cpu"], "vae.convolution": "cudnn"}
"""What has one implementation by the kind of device."""

PLAIN_NAMES = {"F32": "float32", "BF16": "bfloat16"}
PRODUCTS = {"int8": "int_mm", "fp8": "scaled_mm"}
ASKED_FOR = ("flash", "xformers", "sage", "math")
"""Ways of attention that run only where they are asked for."""


@dataclass(frozen=True)
class Use:
    """One op at one place of a run.

    Attributes:
        name: where it runs and what it does, ``transformer.linear``.
        op: its name in ``kernels.dispatch``.
        kind: of the device it runs on.
    """

    name: str
    op: str
    kind: str

    def answers(self, pin: str) -> bool:
        """Whether a pin means this op."""
        return pin in (self.name, self.op, self.name.rpartition(".")[2])


@dataclass(frozen=True)
class Picked:
    """The kernels of a run.

    Attributes:
        names: place and op to implementation.
        safe: place and op to the implementation that is its definition.
        passed_over: the same to those that would have been preferred, with the reason why they cannot run.
    """

    names: Mapping[str, str]
    safe: Mapping[str, str]
    passed_over: Mapping[str, Mapping[str, str]]


def machine_of(device: DeviceFacts, kind: str, plain: str) -> Machine:
    """What decides between implementations on the device, or on its host's CPU."""
    unusable = device.unusable
    return Machine(
        kind=kind,
        architecture=device.architecture if kind == "cuda" else None,
        triton=unusable.get("triton", ""),
        native=unusable.get("native", ""),
        dtype=PLAIN_NAMES[plain],
        unusable=unusable,
    )


OPS = ("attention", "modulate", "rope", "guidance")


def uses(  # noqa: PLR0913 (all but the first two by name)
    device: DeviceFacts,
    formats: Formats,
    *,
    branches: int,
    encoder_on_cpu: bool,
    rcm: bool = False,
    ops: Collection[str] = OPS,
) -> tuple[Use, ...]:
    """The ops of a run that have more than one implementation.

    Args:
        device: where it runs.
        formats: an op is used where its weight format is.
        branches: forward passes per step; one has no guidance.
        encoder_on_cpu: the text encoder runs on the host.
        rcm: the region of change is found on the way.
        ops: of a step of this model.
    """
    kind, encoder = device.kind, "cpu" if encoder_on_cpu else device.kind
    found = [Use(f"transformer.{op}", op, kind) for op in ops if op != "guidance"]
    if branches > 1 and "guidance" in ops:
        found.append(Use("guidance", "guidance", kind))
    if rcm:
        found.append(Use("rcm", "rcm", kind))
    linear = (("transformer", formats.transformer, kind), ("text_encoder", formats.encoder, encoder))
    for component, weight_format, where in linear:
        if weight_format in QUANTISED:
            found += [
                Use(f"{component}.linear", f"linear_{weight_format}", where),
                Use(f"{component}.quant", "quant", where),
            ]
    if {formats.transformer, formats.encoder} & QUANTISED.keys():
        found.append(Use("packing.quant", "quant", "cpu"))
    return tuple(found)


def pick(
    device: DeviceFacts,
    formats: Formats,
    choices: Choices,
    *,
    branches: int,
    rcm: bool = False,
    ops: Collection[str] = OPS,
) -> Picked:
    """The implementation of every op; arguments as of :func:`uses`.

    Raises:
        RequestError: a pin names no op of this run, or what is pinned cannot run here; with the reason of each.
    """
    used = uses(device, formats, branches=branches, encoder_on_cpu=choices.text_encoder_cpu, rcm=rcm, ops=ops)
    _check_pins(used, choices)
    names, passed = {}, {}
    for use in used:
        machine = machine_of(device, use.kind, formats.plain)
        names[use.name] = made = _choose(use, machine, choices)
        before = list(takewhile(lambda each, made=made: each[0] != made, reasons(use.op, machine).items()))
        if before:
            passed[use.name] = {name: why or f"{made} is asked for" for name, why in before}
    plain = {f"{part}.linear": "torch" for part in ("transformer", "text_encoder")}
    rest = {**plain, "text_encoder.attention": "sdpa", **FIXED[device.kind]}
    safe = {use.name: definition(use.op) for use in used}
    return Picked({**rest, **names}, {**rest, **safe}, passed)


def linear_of(component: str, device: DeviceFacts, formats: Formats, choices: Choices) -> Linear:
    """The kernel of a component's linear layers with its scratch.

    Raises:
        RequestError: as :func:`pick`.
    """
    kind = "cpu" if component == "text_encoder" and choices.text_encoder_cpu else device.kind
    weight_format = formats.transformer if component == "transformer" else formats.encoder
    name = "torch"
    if weight_format in QUANTISED:
        use = Use(f"{component}.linear", f"linear_{weight_format}", kind)
        name = _choose(use, machine_of(device, kind, formats.plain), choices)
    chunk = DEVICE_CHUNK_ELEMENTS if kind == "cuda" else CHUNK_ELEMENTS
    return Linear(name, ITEM_BYTES[formats.plain], chunk)


def attention_of(device: DeviceFacts, formats: Formats, choices: Choices) -> str:
    """What computes the attention of the transformer.

    Raises:
        RequestError: what is asked for cannot run here; the message says why, or how to install it.
    """
    use = Use("transformer.attention", "attention", device.kind)
    return _choose(use, machine_of(device, device.kind, formats.plain), choices)


def products(model: ModelFacts, job: JobFacts, device: DeviceFacts, choices: Choices) -> dict[str, set[Shape]]:
    """The weights [N, K] that torch's 8-bit matrix products would meet on the device, by the name of the product."""
    formats = pick_formats(device, job, choices)
    parts = [(model.transformer.stack, formats.transformer)]
    parts += [] if choices.text_encoder_cpu else [(model.encoder.stack, formats.encoder)]
    found: dict[str, set[Shape]] = {}
    for stack, weight_format in parts:
        if device.kind == "cuda" and weight_format in PRODUCTS:
            found.setdefault(PRODUCTS[weight_format], set()).update(_matrices(stack))
    return found


def _matrices(stack: Stack) -> set[Shape]:
    named = {(name, shape) for block in stack.blocks for name, shape in block.items()}
    return {shape for name, shape in named if len(shape) == 2 and name.endswith(".weight") and name not in stack.keep}


def pinned(use: Use, choices: Choices) -> str | None:
    """What is asked for at a place, if anything; the nearest name counts: place, then op, then last word."""
    if use.op == "attention":
        return choices.attention if choices.attention in ASKED_FOR else None
    keys = (use.name, use.op, use.name.rpartition(".")[2])
    return next((choices.kernels[key] for key in keys if key in choices.kernels), None)


def _choose(use: Use, machine: Machine, choices: Choices) -> str:
    asked = pinned(use, choices)
    if use.op == "attention" and asked is not None:
        reason = reasons(use.op, machine)[asked]
        if reason:
            raise RequestError(
                f"attention must be one that can run here, got {asked}: {reason}", hint="--attn-mode sdpa"
            )
        return asked
    try:
        return choose(use.op, machine, asked)
    except KernelError as error:
        raise RequestError(error.message, hint=f"leave --kernel {use.name} out") from error


def _check_pins(used: tuple[Use, ...], choices: Choices) -> None:
    free = [use for use in used if use.op != "attention"]
    for pin in choices.kernels:
        if pin.rpartition(".")[2] == "attention":
            raise RequestError(f"kernels must leave attention to its own choice, got {pin!r}", hint="--attn-mode")
        if not any(use.answers(pin) for use in free):
            known = ", ".join(use.name for use in free)
            raise RequestError(f"kernels must name ops of this run ({known}), got {pin!r}")
