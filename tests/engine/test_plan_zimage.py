"""Predicted bytes of Z-Image's phases against the bytes of tensors that are really alive, on random models."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.plan import JobFacts, ModelFacts
from qengine.engine.plan.activations import Linear
from qengine.engine.plan.zimage import Qwen3Encoder, ZTransformer
from qengine.engine.stack import Hold
from qengine.engine.zimage import ZImageEncoder, ZImageTransformer
from qengine.loaders import ModelSource
from zpipelines import open_zimage, shared_zimage

CPU = torch.device("cpu")
SLACK_BYTES = 256 << 10
SIDES = st.integers(1, 24)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PROPERTY = settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


@cache
def source() -> ModelSource:
    return open_zimage(shared_zimage())


@cache
def facts() -> ModelFacts:
    return ModelFacts.of(source())


def transformer_facts() -> ZTransformer:
    found = facts().transformer
    assert isinstance(found, ZTransformer)
    return found


@cache
def transformer_of(dtype: torch.dtype, weight_format: str = "bf16", cache_dir: Path | None = None) -> ZImageTransformer:
    hold = Hold(weight_format)
    return ZImageTransformer.load(source().transformer, device=CPU, dtype=dtype, cache=cache_dir, hold=hold)


def holds(predicted: int, measured: int, elsewhere: int = 0) -> None:
    """``elsewhere``: bytes of latents that a whole run keeps and a single evaluation does not."""
    assert measured <= predicted <= 2 * measured + SLACK_BYTES + elsewhere


def job_of(target: tuple[int, int], texts: list[int], steps: int = 2) -> JobFacts:
    return JobFacts(
        kind="generate",
        target=target,
        prompt_tokens=tuple(texts),
        shared_tokens=3,
        dropped_tokens=0,
        steps=steps,
    )


TEXTS = st.lists(st.integers(1, 224), min_size=1, max_size=2)


@PROPERTY
@given(target=st.tuples(SIDES, SIDES), texts=TEXTS, dtype=DTYPES)
def test_a_step_allocates_no_more_than_predicted(target, texts, dtype) -> None:
    job, s, model = job_of(target, texts), dtype.itemsize, transformer_of(dtype)
    with torch.no_grad():
        table = model.table([0.5])
        with AllocationMeter(meta=False) as live:
            prompts = [torch.randn(count, 48, dtype=dtype) for count in texts]
            contexts = model.contexts(prompts, *target)
            before, live.peak = live.peak, live.live
            model.velocity(torch.randn(1, job.target_tokens, 64).to(dtype), contexts, table, 0.5)
    model.captions._known = []
    facts = transformer_facts()
    holds(facts.step_bytes(job, s, Linear("torch", s), "sdpa"), live.peak, 40 * 64 * job.target_tokens)
    holds(facts.caption_bytes(job, s, "sdpa"), before)


@PROPERTY
@given(steps=st.integers(1, 40), dtype=DTYPES)
def test_modulation_rows_allocate_no_more_than_predicted(steps, dtype) -> None:
    model, facts, job = transformer_of(dtype), transformer_facts(), job_of((1, 1), [1], steps)
    model._rows._known.clear()
    with AllocationMeter(meta=False) as live:
        model.table([index / 64 for index in range(steps)])
    s = dtype.itemsize
    holds(
        facts.modulation_bytes(job) + facts.rows_bytes(job, s) + (facts.rows_bytes(job, 4) if s < 4 else 0), live.peak
    )


def test_facts_of_a_random_model_are_those_of_its_parts() -> None:
    model = facts()
    assert len(model.transformer.stack.blocks) == 5 and len(model.encoder.stack.blocks) == 2
    assert model.multiple == 16
    for weight_format in ("bf16", "int8", "fp8"):
        stack = ZImageTransformer.stack(source().transformer, weight_format, torch.bfloat16)
        assert model.transformer.stack.slab_bytes(weight_format, "BF16") == tuple(s.nbytes for s in stack.layouts)
        layers = ZImageEncoder(source(), CPU, torch.bfloat16).stack(weight_format)
        assert model.encoder.stack.slab_bytes(weight_format, "BF16") == tuple(s.nbytes for s in layers.layouts)


@PROPERTY
@given(
    prompts=st.lists(st.text("a cat", min_size=1, max_size=400).filter(str.strip), min_size=1, max_size=2, unique=True),
    dtype=DTYPES,
)
def test_encoding_allocates_no_more_than_predicted(prompts, dtype) -> None:
    encoder = ZImageEncoder(source(), CPU, dtype)
    encoder.encode(["warm up"])
    job = JobFacts.build(
        kind="generate",
        template="z-image",
        prompts=prompts,
        target=(4, 4),
        references=(),
        conditions=(),
        processor={},
        steps=1,
    )
    assert all(len(encoder.tokens(p)) <= n for p, n in zip(prompts, job.prompt_tokens, strict=True))
    with AllocationMeter(meta=False) as live:
        encoder.encode(prompts)
    model, s = facts().encoder, dtype.itemsize
    assert isinstance(model, Qwen3Encoder)
    predicted = model.encode_bytes(job, s, Linear("torch", s))
    holds(predicted, live.peak)
