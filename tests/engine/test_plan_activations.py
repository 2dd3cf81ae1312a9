"""Predicted activations against the bytes of tensors that are really alive, on random models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import shared_pipeline
from qengine import Engine
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.defaults import DEFAULTS
from qengine.engine.dit import Emphasis, QwenImageTransformer, Run
from qengine.engine.encoder import PromptEncoder
from qengine.engine.plan import (
    Budget,
    Choices,
    DeviceFacts,
    JobFacts,
    ModelFacts,
    foresee,
    make_plan,
)
from qengine.engine.plan.activations import (
    Linear,
    language_bytes,
    modulation_bytes,
    rows_bytes,
    step_bytes,
    vision_bytes,
)
from qengine.engine.plan.jobs import patch_grid
from qengine.kernels.linear_fp8 import linear_fp8
from qengine.kernels.linear_int8 import linear_int8
from qengine.loaders import ModelSource, open_model

CPU = torch.device("cpu")
SLACK_BYTES = 1 << 20
SIDES = st.integers(1, 24)
GRIDS = st.tuples(SIDES, SIDES)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PROPERTY = settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


@cache
def source() -> ModelSource:
    return open_model(shared_pipeline("edit-2511"))


@cache
def facts() -> ModelFacts:
    return ModelFacts.of(source())


@cache
def transformer_of(dtype: torch.dtype) -> QwenImageTransformer:
    return QwenImageTransformer.load(source().transformer, device=CPU, dtype=dtype, cache=None)


def holds(predicted: int, measured: int) -> None:
    assert measured <= predicted <= 2 * measured + SLACK_BYTES


def job_of(target, references, texts, steps: int = 2) -> JobFacts:
    return JobFacts(
        kind="edit" if references else "generate",
        target=target,
        references=tuple(references),
        prompt_tokens=tuple(64 + text for text in texts),
        shared_tokens=64,
        dropped_tokens=64,
        steps=steps,
    )


@PROPERTY
@given(
    target=GRIDS,
    references=st.lists(GRIDS, max_size=2),
    texts=st.lists(st.integers(1, 400), min_size=1, max_size=2),
    dtype=DTYPES,
)
def test_a_step_allocates_no_more_than_predicted(target, references, texts, dtype) -> None:
    model, transformer = facts(), transformer_of(dtype)
    job, s = job_of(target, references, texts), dtype.itemsize
    with torch.no_grad(), AllocationMeter() as live:
        table = transformer.table([first := float(torch.rand(())), 0.25])
        branches = [transformer.branch(torch.randn(n, 64, dtype=dtype), [target, *references]) for n in texts]
        latents = torch.randn(1, job.target_tokens, 64)
        seen = torch.randn(1, job.reference_tokens, 64, dtype=dtype) if references else None
        transformer.velocity(latents.to(dtype), seen, branches, table, first)
    rows = rows_bytes(model.transformer, job, s) + (rows_bytes(model.transformer, job, 4) if s < 4 else 0)
    step = step_bytes(model.transformer, job, s, Linear("torch", s))
    holds(rows + max(step, modulation_bytes(model.transformer, job)), live.peak)


@settings(PROPERTY, max_examples=6)
@given(target=GRIDS, picture=GRIDS, text=st.integers(1, 400), dtype=DTYPES)
def test_a_step_whose_references_weigh_less_allocates_no_more_than_predicted(target, picture, text, dtype) -> None:
    model, transformer = facts(), transformer_of(dtype)
    job, s = replace(job_of(target, [picture], [text]), steered=True), dtype.itemsize
    with torch.no_grad(), AllocationMeter() as live:
        table = transformer.table([first := float(torch.rand(())), 0.25])
        branch = transformer.branch(torch.randn(text, 64, dtype=dtype), [target, picture])
        weighed = replace(branch, emphasis=Emphasis((Run(job.reference_tokens, -0.5),)))
        seen = torch.randn(1, job.reference_tokens, 64, dtype=dtype)
        transformer.velocity(torch.randn(1, job.target_tokens, 64).to(dtype), seen, [weighed], table, first)
    rows = rows_bytes(model.transformer, job, s) + (rows_bytes(model.transformer, job, 4) if s < 4 else 0)
    step = step_bytes(model.transformer, job, s, Linear("torch", s))
    holds(rows + max(step, modulation_bytes(model.transformer, job)), live.peak)


@settings(PROPERTY, max_examples=6)
@given(
    sizes=st.lists(st.tuples(st.integers(30, 300), st.integers(30, 300)), min_size=1, max_size=2),
    prompts=st.lists(st.text("a cat", min_size=1, max_size=200).filter(str.strip), min_size=1, max_size=2, unique=True),
    dtype=DTYPES,
)
def test_encoding_allocates_no_more_than_predicted(sizes, prompts, dtype) -> None:
    model = facts()
    pictures = [Image.new("RGB", size, (200, 90, 30)) for size in sizes]
    encoder = PromptEncoder(source(), CPU, dtype)
    encoder.encode(["warm up"], pictures, "edit-plus")
    job = JobFacts.build(
        kind="edit",
        template="edit-plus",
        prompts=prompts,
        target=(4, 4),
        references=[(4, 4)] * len(sizes),
        conditions=sizes,
        processor=source().processor_config,
        steps=1,
    )
    with AllocationMeter() as live:
        encoder.encode(prompts, pictures, "edit-plus")
    linear, s = Linear("torch", dtype.itemsize), dtype.itemsize
    vision = vision_bytes(model.encoder, job, s, linear)
    # the image processor's float32 patches are numpy's, which no tensor operation makes
    patches = 4 * model.encoder.patch_values * sum(rows * columns for rows, columns in job.patches)
    holds(max(vision, language_bytes(model.encoder, job, s, linear)), live.peak + patches)


@pytest.mark.parametrize("size", [(384, 384), (97, 61), (1, 200), (3000, 20), (4000, 4000), (28, 28)])
@pytest.mark.parametrize("limits", [(3136, 62720), (56 * 56 * 4, 12845056)])
def test_the_patch_grid_is_that_of_the_image_processor(size: tuple[int, int], limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    processor = {"patch_size": 14, "merge_size": 2, "min_pixels": limits[0], "max_pixels": limits[1]}
    width, height = size
    high, wide = smart_resize(height, width, 28, *limits)
    assert patch_grid(width, height, processor) == (high // 14, wide // 14)


@PROPERTY
@given(
    rows=st.integers(1, 700),
    inputs=st.sampled_from([64, 256, 1280]),
    outputs=st.sampled_from([64, 1000, 3000]),
    dtype=DTYPES,
    weight_format=st.sampled_from(["int8", "fp8"]),
)
def test_a_quantised_linear_layer_takes_no_more_than_its_scratch(rows, inputs, outputs, dtype, weight_format) -> None:
    x, scale = torch.randn(rows, inputs, dtype=dtype), torch.rand(outputs)
    weight = torch.randint(-100, 100, (outputs, inputs), dtype=torch.int8)
    with torch.no_grad(), AllocationMeter() as live:
        if weight_format == "int8":
            linear_int8(x, weight, scale, None, 64)
        else:
            linear_fp8(x, weight.to(torch.float8_e4m3fn), scale, None, "dequantise")
    kernel = "reference" if weight_format == "int8" else "dequantise"
    result = rows * outputs * dtype.itemsize
    given_weight = weight.nbytes if weight_format == "fp8" else 0
    predicted = Linear(kernel, dtype.itemsize).scratch(rows, inputs, outputs) + result + given_weight
    assert live.peak <= predicted <= 3 * live.peak + 2 * SLACK_BYTES


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "scale"), [((96, 64), 1.0), ((256, 320), 4.0)])
def test_a_whole_run_stays_below_the_predicted_peak(dtype: str, size: tuple[int, int], scale: float, tmp_path) -> None:
    model = facts()
    defaults = replace(DEFAULTS["qwen-image-edit-2511"], reference_area_pixels=None)
    fields = {"prompt": "make it night", "size": size, "num_inference_steps": 2, "true_cfg_scale": scale}
    job = foresee(defaults, [size], fields, source().processor_config, multiple=16, dtype=dtype)
    device = DeviceFacts(
        kind="cpu", total_bytes=64 << 30, free_bytes=64 << 30, host_total_bytes=64 << 30, host_free_bytes=64 << 30
    )
    plan = make_plan(model, job, Budget(), device, Choices())
    with (
        pytest.MonkeyPatch.context() as patch,
        Engine.open(shared_pipeline("edit-2511"), device="cpu", dtype=dtype, cache_dir=tmp_path) as engine,
    ):
        patch.setitem(DEFAULTS, engine.source.defaults, defaults)
        with AllocationMeter() as live:
            picture = Image.new("RGB", size, (200, 90, 30))
            engine.edit(picture, **fields)
    assert live.peak <= plan.vram_bytes
    assert set(plan.kept_on_device) == {"transformer", "text_encoder", "vae"}
