"""The first stage: prompt embeddings by the pictures that the text encoder sees, or those that were given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError
from .conditioning import Conditioning
from .given import Given
from .picture import resize
from .reference.resolve import veil

if TYPE_CHECKING:
    from .components import Components
    from .job import Job
    from .reference.apply import Cast

Made = tuple[Mapping["Cast", Conditioning], bool]


def encode(job: Job, components: Components, check: Callable[[], None]) -> Made:
    """Prompt embeddings of a job by the pictures that the text encoder sees, and whether none had to be computed.

    Args:
        job: the resolved request; what it says is given is not encoded.
        components: the text encoder among them; it is loaded only where something is neither given nor in the cache.
        check: called before each layer; raises to stop the run.
    """
    check()
    if job.given is not None and job.given.prompt_embeds is not None:
        return _given(job, components, check)
    made: dict[Cast, Conditioning] = {}
    known = []
    alone = job.negative_prompt is not None and bool(job.pictures) and not job.reference.negative
    for shown in dict.fromkeys(job.shown(cast) for cast in job.casts):
        negative = None if alone else job.negative_prompt
        made[shown], cached = _condition(job, components, job.prompt, negative, shown, check)
        known.append(cached)
    if alone and job.negative_prompt is not None:
        second, cached = _condition(job, components, job.negative_prompt, None, job.shown(()), check)
        known.append(cached)
        made = {shown: replace(each, negative_embeds=second.prompt_embeds) for shown, each in made.items()}
    return made, all(known)


def only_cast(job: Job) -> Cast:
    """The pictures that every step sees: all of them.

    Raises:
        RequestError: a step sees fewer.
    """
    every = tuple(range(len(job.references)))
    if job.casts != (every,):
        raise RequestError(
            "every picture must be seen by every step to be encoded beforehand, got strengths of 0",
            hint="leave out the pictures, or say the strength when the picture is made",
        )
    return every


def given_of(job: Job, known: Conditioning, references: tuple[torch.Tensor, ...], init: torch.Tensor | None) -> Given:
    """What was encoded of a job, on the CPU, as another run takes it."""
    known = known.to(torch.device("cpu"))
    size = (job.target.width, job.target.height) if references or init is not None else None
    return Given(known.prompt_embeds, known.negative_embeds, references, init, size)


def _given(job: Job, components: Components, check: Callable[[], None]) -> Made:
    """Conditioning from given embeddings; a negative prompt that is needed and not given is encoded."""
    given = job.given
    if given is None or given.prompt_embeds is None:
        raise RuntimeError("prompt embeddings were not given")
    negative, cached = None, True
    if job.negative_prompt is not None:
        negative = given.negative_embeds
        if negative is None:
            second, cached = _condition(job, components, job.negative_prompt, None, (), check)
            negative = second.prompt_embeds
    return {(): Conditioning(given.prompt_embeds, negative, given.key)}, cached


def _condition(
    job: Job, components: Components, prompt: str, negative: str | None, shown: Cast, check: Callable[[], None]
) -> tuple[Conditioning, bool]:
    masks = job.masks if job.reference.mask_vision and job.masks else (None,) * len(job.pictures)
    pictures = [resize(veil(job.pictures[k].image, masks[k]), *job.conditions[k]) for k in shown]
    return components.condition(prompt, negative, pictures, job.template_for(shown), check)
