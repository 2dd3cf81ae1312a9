"""The plan of Z-Image: predicted against what really lives, on random models, and the true shapes under ceilings."""

from __future__ import annotations

from functools import cache

from qengine.engine.plan import JobFacts, ModelFacts
from qengine.loaders import ModelSource
from zpipelines import open_zimage, shared_zimage


@cache
def source() -> ModelSource:
    return open_zimage(shared_zimage())


@cache
def facts() -> ModelFacts:
    return ModelFacts.of(source())


def job_of(target: tuple[int, int], texts: list[int], steps: int = 2, encoded: tuple = ()) -> JobFacts:
    return JobFacts(
        kind="generate",
        target=target,
        prompt_tokens=tuple(texts),
        shared_tokens=3,
        dropped_tokens=0,
        steps=steps,
        encoded=encoded,
    )


def test_facts_of_a_random_model_are_those_of_its_parts() -> None:
    model = facts()
    assert len(model.transformer.stack.blocks) == 5 and len(model.encoder.stack.blocks) == 2
    assert model.multiple == 16
