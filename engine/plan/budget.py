"""What a user allows and chooses: ceilings, and how the weights are held; the command line and Python share it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ...errors import RequestError
from ..formats import FORMATS

GIB = 1 << 30
UNITS = {
    "": GIB,
    "b": 1,
    "k": 1 << 10,
    "kib": 1 << 10,
    "kb": 10**3,
    "m": 1 << 20,
    "mib": 1 << 20,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 10**12,
}
WEIGHTS = ("auto", *FORMATS)
OFFLOADS = ("auto", "none", "blocks", "sequential")
ATTENTIONS = ("sdpa", "math", "flash", "xformers", "sage")
ATTENTION_ALIASES = {"torch": "sdpa", "sageattn": "sage"}
NO_PINS: Mapping[str, str] = MappingProxyType({})

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_NAMES = ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def parse_size(text: str | int | float) -> int:
    """Bytes of ``12GiB``, ``12g`` or ``12`` (all 12 x 2^30), ``512MiB`` (2^20), ``12GB`` (12 x 10^9) or ``4096b``.

    A number without a unit counts GiB, as cards are named.

    Raises:
        RequestError: it is no positive size.
    """
    found = _SIZE.fullmatch(str(text))
    unit = UNITS.get(found.group(2).lower()) if found else None
    count = 0 if found is None or unit is None else round(float(found.group(1)) * unit)
    if count < 1:
        raise RequestError(
            f"a size must be a positive number of GiB or a number with its unit, got {str(text)!r}",
            hint="12GiB, 512MiB, 12GB (10^9 bytes) or 12",
        )
    return count


def size_text(nbytes: int, *, up: bool = True) -> str:
    """A size that :func:`parse_size` reads, to a hundredth of its unit: 12884901888 is ``12GiB``.

    Args:
        nbytes: the size.
        up: round up (what is needed) or down (what is there).
    """
    unit, name = next(((unit, name) for unit, name in _NAMES if nbytes >= unit), (1, "b"))
    hundredths = (nbytes * 100 + (unit - 1 if up else 0)) // unit
    whole, rest = divmod(hundredths, 100)
    return f"{whole}.{rest:02d}".rstrip("0").rstrip(".") + name if rest else f"{whole}{name}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Ceilings. None takes what is free when the plan is made, less a margin that the plan states.

    Attributes:
        vram_bytes: all memory of the device, its context included.
        ram_bytes: host memory of the process: slabs, staging and what its imports take.

    Raises:
        RequestError: a ceiling is not a positive whole number.
    """

    vram_bytes: int | None = None
    ram_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("vram_bytes", "ram_bytes"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RequestError(f"{name} must be a positive whole number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How weights are held and what computes.

    Whatever is chosen here can change bits only through formats, tiles, component devices, kernels and attention.

    Attributes:
        weights: ``auto``, ``bf16``, ``int8`` or ``fp8`` for the transformer's blocks.
        text_encoder_weights: the same for the text encoder; ``auto`` follows ``weights``.
        blocks_to_swap: transformer blocks that are streamed; None lets the plan choose the fewest that fit.
        offload: ``auto``; ``none``, every block resident or refused; ``blocks``, at least one block streamed;
            ``sequential``, every block streamed and one component at a time.
        text_encoder_cpu: the text encoder runs on the CPU; a recorded choice, since it changes bits.
        vae_tile: side of a VAE tile in pixels; None takes the device's fixed one.
        vae_weights: ``bf16`` (the compute dtype), ``int8`` or ``fp8`` rows for the VAE's convolutions.
        kernels: implementations that must run, by where they run (``transformer.linear``), by op (``linear_int8``) or
            by the last word of where (``linear``); see ``Plan.kernels`` for the names. The rest is the device's choice.
        attention: of the transformer: ``sdpa`` (also ``torch``), ``flash``, ``xformers``, ``sage`` (also
            ``sageattn``), or ``math``, the definition in float32.

    Raises:
        RequestError: a value is none of these, or two contradict each other.
    """

    weights: str = "auto"
    text_encoder_weights: str = "auto"
    blocks_to_swap: int | None = None
    offload: str = "auto"
    text_encoder_cpu: bool = False
    vae_tile: int | None = None
    vae_weights: str = "bf16"
    kernels: Mapping[str, str] = field(default_factory=lambda: NO_PINS)
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", ATTENTION_ALIASES.get(self.attention, self.attention))
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("text_encoder_weights", self.text_encoder_weights, WEIGHTS)
        _one_of("offload", self.offload, OFFLOADS)
        _one_of("vae_weights", self.vae_weights, FORMATS)
        _at_least("blocks_to_swap", self.blocks_to_swap, 0)
        _at_least("vae_tile", self.vae_tile, 1)
        if self.blocks_to_swap is not None and self.offload in ("none", "sequential"):
            raise RequestError(
                f"blocks_to_swap must be given without offload {self.offload}, got {self.blocks_to_swap}",
                hint="leave one of them out",
            )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _at_least(name: str, value: object, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise RequestError(f"{name} must be a whole number from {least}, got {value!r}")
