"""Edits after one another: stages of one edit, and chains of prompts. The picture of each is the next one's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import RequestError
from .reference.options import Reference, Strength, parse_strength, segments
from .request import MAX_SEED

if TYPE_CHECKING:
    from PIL import Image

    from .events import Result

    Picture = Image.Image | str | PathLike[str]


class Editor(Protocol):
    """What a chain needs of an engine."""

    def edit(self, images: tuple[Picture, ...], prompt: str, **options: Any) -> Result:
        """Edit pictures."""
        ...


@dataclass(frozen=True)
class Stage:
    """One edit of several. Fields left None are those of the whole.

    Attributes:
        method: of the references.
        strength: of the references.
        prompt: of this stage.
        denoise: share of the schedule that is run.
        steps: of this stage.
        seed: of its noise.

    Raises:
        RequestError: a method or a strength that is not understood.
    """

    method: str = "default"
    strength: Strength = 1.0
    prompt: str | None = None
    denoise: float | None = None
    steps: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        segments(self.method)
        parse_strength(self.strength)


THREE_STAGES = (Stage("default", 0.4), Stage("inject", 0.8), Stage("cross_attn", 1.2))
"""A loose start, then two closer and closer looks at what it made."""


@dataclass(frozen=True)
class Link:
    """One edit that is done.

    Attributes:
        index: from 0.
        stage: its settings, prompt and seed decided.
        result: what it made.
    """

    index: int
    stage: Stage
    result: Result = field(repr=False)


def run_stages(
    engine: Editor,
    image: Picture,
    prompt: str,
    stages: Sequence[Stage],
    *,
    keep_original: bool = False,
    reference: Reference | None = None,
    **options: Any,
) -> Iterator[Link]:
    """The stages, one after another: the picture of stage k - 1 is the input of stage k.

    One stage is a plain edit. With ``keep_original`` the original is the second reference from the second stage on,
    with the strength of the stage. A stage without a seed takes that of the whole, so that all start from one noise.

    Args:
        engine: that edits.
        image: the first input.
        prompt: of the stages that have none.
        stages: at least one.
        keep_original: show the original to every stage.
        reference: options of the references beside method and strength.
        options: fields of the edit requests, ``seed``, ``num_inference_steps`` and ``denoise`` among them.

    Raises:
        RequestError: there are no stages, or a request is refused.
    """
    if not stages:
        raise RequestError("stages must be at least one, got none")
    common = reference or Reference()
    pictures: tuple[Picture, ...] = (image,)
    for index, asked in enumerate(stages):
        stage = replace(
            asked,
            prompt=prompt if asked.prompt is None else asked.prompt,
            seed=options.get("seed", 0) if asked.seed is None else asked.seed,
        )
        own = {"num_inference_steps": stage.steps, "denoise": stage.denoise}
        result = engine.edit(
            pictures,
            str(stage.prompt),
            reference=replace(common, method=stage.method, strength=stage.strength),
            **options | {name: value for name, value in own.items() if value is not None} | {"seed": stage.seed},
        )
        yield Link(index, stage, result)
        pictures = (result.image, image) if keep_original else (result.image,)


def run_chain(
    engine: Editor, image: Picture, prompts: Sequence[str], *, seed: int = 0, **options: Any
) -> Iterator[Link]:
    """One edit per prompt, each of the picture that the one before made; prompt i (from 0) has ``seed + i``.

    Args:
        engine: that edits.
        image: the first input.
        prompts: at least one.
        seed: of the first edit.
        options: fields of the edit requests.

    Raises:
        RequestError: there are no prompts, the last seed is too large, or a request is refused.
    """
    if not prompts:
        raise RequestError("prompts must be at least one, got none")
    if seed + len(prompts) - 1 > MAX_SEED:
        raise RequestError(f"seed must be at most {MAX_SEED - len(prompts) + 1} for {len(prompts)} prompts, got {seed}")
    picture = image
    for index, prompt in enumerate(prompts):
        result = engine.edit((picture,), prompt, seed=seed + index, **options)
        reference = options.get("reference") or Reference()
        strength = reference.strength if not isinstance(reference.strength, tuple) else reference.strength[0]
        yield Link(index, Stage(reference.method, strength, prompt, seed=seed + index), result)
        picture = result.image
