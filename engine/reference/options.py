"""How reference pictures act on a run: method and strength, per picture and per step. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

from ...errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

METHODS = ("default", "inject", "concat", "cross_attn")
MAX_STRENGTH = 2.0
ARTEFACTS_ABOVE = 1.5
CURVES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "ease_in": lambda t: t * t,
    "ease_out": lambda t: 1 - (1 - t) ** 2,
}

Strength = float | str


@dataclass(frozen=True)
class StepReference:
    """What the references do in one step.

    Attributes:
        method: one of ``METHODS``.
        strengths: one per picture; a picture of strength 0 is not there.
    """

    method: str
    strengths: tuple[float, ...]

    @property
    def present(self) -> tuple[int, ...]:
        """Places of the pictures that are there: those whose strength is not 0."""
        return tuple(k for k, strength in enumerate(self.strengths) if strength > 0)


@dataclass(frozen=True)
class Segment:
    """A stretch of the steps with one method: ``concat@0.6:0.5`` is concat at strength 0.6 up to half of the steps.

    Attributes:
        method: one of ``METHODS``.
        end: fraction of the steps at which it ends, 0 to 1.
        strength: its own strength, or None for that of the request.
    """

    method: str
    end: float
    strength: Strength | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Options of the reference pictures.

    Attributes:
        method: ``default``, ``inject``, ``concat``, ``cross_attn``, or several with the fraction of the steps at which
            each ends: ``concat:0.5,inject``; a segment may have a strength, ``concat@0.6:0.5,inject@1.2``.
        strength: 0 to 2, for all pictures or one per picture: a number, a run ``0.2:1.0`` or ``0.2:1.0:ease_in`` from
            the first step to the last, or one number per step, ``0.2,0.4,0.8``. 0 is text to image, 1 as trained.
        masks: one per picture or none: only what is white of a picture is a reference.
        mode: of ``default``: ``gain`` adds ln s to the attention logits, ``latent`` multiplies the latents by s.
        cross_attn_rule: ``scale`` multiplies keys by s, ``gain`` adds ln s to the logits.
        inject_gain: factor of what ``inject`` adds; 0 makes it ``default``.
        inject_into: ``input`` of the network, or the running ``state``.
        keep_vision_at_zero: the text encoder sees a picture of strength 0 all the same.
        keep_frame_index: pictures after one of strength 0 keep their place in the rotary positions.
        negative: the negative prompt's branch sees the references too.
        mask_vision: the text encoder sees masked pictures grey where the mask is black.

    Raises:
        RequestError: a value is out of range or not understood.
    """

    method: str = "default"
    strength: Strength | tuple[Strength, ...] = 1.0
    masks: tuple[Image.Image | str | PathLike[str] | None, ...] = ()
    mode: str = "gain"
    cross_attn_rule: str = "scale"
    inject_gain: float = 1.0
    inject_into: str = "input"
    keep_vision_at_zero: bool = False
    keep_frame_index: bool = False
    negative: bool = True
    mask_vision: bool = True

    def __post_init__(self) -> None:
        _one_of("reference mode", self.mode, ("gain", "latent"))
        _one_of("cross_attn rule", self.cross_attn_rule, ("scale", "gain"))
        _one_of("inject_into", self.inject_into, ("input", "state"))
        if not isinstance(self.inject_gain, int | float) or not 0 <= self.inject_gain <= MAX_STRENGTH:
            raise RequestError(f"inject_gain must be from 0 to {MAX_STRENGTH:g}, got {self.inject_gain!r}")
        if not isinstance(self.masks, tuple):
            raise RequestError(f"reference masks must be a tuple, got {self.masks!r}")
        segments(self.method)
        for strength in self._strengths():
            parse_strength(strength)

    def _strengths(self) -> tuple[Strength, ...]:
        return self.strength if isinstance(self.strength, tuple) else (self.strength,)

    def table(self, steps: int, pictures: int) -> tuple[StepReference, ...]:
        """What the references do in each step.

        Args:
            steps: of the run.
            pictures: how many there are.

        Raises:
            RequestError: the number of strengths is not that of the pictures, or a list is not as long as the run.
        """
        given = self._strengths()
        if len(given) not in (1, pictures):
            raise RequestError(
                f"reference strength must be one for all or one per picture ({pictures}), got {len(given)}"
            )
        own = given * pictures if len(given) == 1 else given
        runs = [schedule(strength, steps) for strength in own]
        found, start = [], 0
        for segment in segments(self.method):
            end = min(steps, math.ceil(segment.end * steps - 1e-9))
            for step in range(start, end):
                strengths = tuple(run[step] for run in runs)
                if segment.strength is not None:
                    strengths = (schedule(segment.strength, end - start)[step - start],) * pictures
                found.append(StepReference(segment.method, strengths))
            start = max(start, end)
        return tuple(found)

    def notes(self) -> tuple[str, ...]:
        """What should be told: strengths that are known to make artefacts."""
        values = [value for strength in self._strengths() for value in parse_strength(strength)[0]]
        values += [v for s in segments(self.method) if s.strength is not None for v in parse_strength(s.strength)[0]]
        if max(values) > ARTEFACTS_ABOVE:
            return (f"a reference strength above {ARTEFACTS_ABOVE:g} often makes artefacts, got {max(values):g}",)
        return ()

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values; masks are left to the caller."""
        plain = asdict(self)
        changed = {field.name: plain[field.name] for field in fields(self) if plain[field.name] != field.default}
        changed.pop("masks", None)
        if isinstance(changed.get("strength"), tuple):
            changed["strength"] = list(changed["strength"])
        return changed


def segments(method: str) -> tuple[Segment, ...]:
    """The stretches of a method text, the last of which ends with the run.

    Raises:
        RequestError: an unknown method, or fractions that do not rise to 1.
    """
    found, before = [], 0.0
    pieces = str(method).split(",")
    for index, piece in enumerate(pieces):
        head, colon, tail = piece.strip().partition(":")
        name, at, strength = head.partition("@")
        _one_of("reference method", name, METHODS)
        last = index == len(pieces) - 1
        end = _fraction(tail, method) if colon else 1.0
        if not before < end <= 1 or (last and end != 1) or (not last and not colon):
            raise RequestError(
                f"reference methods must end at rising fractions of the steps, the last at 1, got {method!r}",
                hint="--reference-method concat:0.5,inject",
            )
        if at:
            parse_strength(strength)
        found.append(Segment(name, end, strength if at else None))
        before = end
    return tuple(found)


def parse_strength(strength: Strength) -> tuple[tuple[float, ...], str | None]:
    """(values, curve): one value, two with a curve, or a list without one.

    Raises:
        RequestError: it is not understood, or outside 0 to 2.
    """
    text = str(strength).strip()
    first, colon, rest = text.partition(":")
    curve: str | None = None
    if colon:
        second, _, curve = rest.partition(":")
        curve = curve or "linear"
        _one_of("strength curve", curve, tuple(CURVES))
        pieces = [first, second]
    else:
        pieces = text.split(",")
    if isinstance(strength, bool):
        pieces = [text]
    return tuple(_value(piece, text) for piece in pieces), curve


def schedule(strength: Strength, steps: int) -> tuple[float, ...]:
    """The strength of each step: ``a + (b - a) curve(i / (steps - 1))`` for a run from a to b.

    Raises:
        RequestError: a list that is not as long as the run.
    """
    values, curve = parse_strength(strength)
    if curve is not None:
        rise = [CURVES[curve](i / (steps - 1)) if steps > 1 else 0.0 for i in range(steps)]
        return tuple(values[0] + (values[1] - values[0]) * t for t in rise)
    if len(values) == 1:
        return values * steps
    if len(values) != steps:
        raise RequestError(f"reference strength must be one number per step ({steps}), got {len(values)} numbers")
    return values


def _value(piece: str, text: str) -> float:
    try:
        value = float(piece)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_STRENGTH:
        raise RequestError(
            f"reference strength must be from 0 to {MAX_STRENGTH:g}, got {text!r}",
            hint="1 is what the model was trained for; 0.2:1.0 rises over the steps",
        )
    return value


def _fraction(piece: str, text: str) -> float:
    try:
        return float(piece)
    except ValueError as error:
        raise RequestError(f"a reference method must end at a fraction of the steps, got {text!r}") from error


def _one_of(subject: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise RequestError(f"{subject} must be one of {', '.join(known)}, got {value!r}")
