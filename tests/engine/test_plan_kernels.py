"""Kernels are chosen once, when a run is planned: by machine, by pin, by name of attention; refusals say why."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from pipelines import shared_pipeline
from qengine.engine.defaults import DEFAULTS
from qengine.engine.plan import (
    Budget,
    Choices,
    DeviceFacts,
    JobFacts,
    ModelFacts,
    Plan,
    activations,
    foresee,
    make_plan,
)
from qengine.engine.plan.kernels import products
from qengine.engine.plan.words import as_json, as_text
from qengine.errors import RequestError
from qengine.kernels.attention import ALIASES, LIBRARIES, reference
from qengine.kernels.dispatch import OPS
from qengine.loaders import open_model

GIB = 1 << 30


@cache
def model() -> ModelFacts:
    return ModelFacts.of(open_model(shared_pipeline("edit-2511")))


@cache
def job(scale: float = 4.0, dtype: str = "auto") -> JobFacts:
    processor = {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056}
    fields = {"prompt": "make it night", "size": (64, 64), "true_cfg_scale": scale}
    return foresee(DEFAULTS["qwen-image-edit-2511"], [(64, 64)], fields, processor, multiple=16, dtype=dtype)


def device(architecture: int | None = 86, **unusable: str) -> DeviceFacts:
    return DeviceFacts(
        kind="cpu" if architecture is None else "cuda",
        architecture=architecture,
        total_bytes=24 * GIB,
        free_bytes=24 * GIB,
        host_total_bytes=64 * GIB,
        host_free_bytes=64 * GIB,
        unusable={name.replace("_", "-") if "sdpa" in name else name: why for name, why in unusable.items()},
    )


def plan(on: DeviceFacts, asked: JobFacts | None = None, **choices) -> Plan:
    return make_plan(model(), asked or job(), Budget(), on, Choices(**choices))


def test_a_card_runs_triton_and_names_its_attention() -> None:
    made = plan(device(86))
    assert made.kernels == {
        "transformer.attention": "sdpa-flash",
        "transformer.modulate": "triton",
        "transformer.rope": "triton",
        "guidance": "triton",
        "transformer.linear": "triton",
        "text_encoder.linear": "triton",
        "transformer.quant": "triton",
        "text_encoder.quant": "triton",
        "packing.quant": "native",
        "text_encoder.attention": "sdpa",
        "vae.attention": "torch",
        "vae.convolution": "cudnn",
    }
    assert made.kernels_of("transformer") == {
        "attention": "sdpa-flash",
        "modulate": "triton",
        "rope": "triton",
        "linear": "triton",
        "quant": "triton",
    }
    assert plan(device(90)).kernels["transformer.linear"] == "scaled_mm"
    assert plan(device(90, scaled_mm="no")).kernels["transformer.linear"] == "triton"
    assert plan(device(86, triton="no")).kernels["text_encoder.linear"] == "int_mm"


def test_a_cpu_runs_definitions_and_torch() -> None:
    made = plan(device(None, native="not built"), weights="int8")
    assert made.kernels["transformer.linear"] == "reference" and made.kernels["packing.quant"] == "reference"
    assert made.kernels["transformer.attention"] == "sdpa" and made.kernels["guidance"] == "reference"
    assert plan(device(None)).kernels["transformer.linear"] == "torch"
    assert "packing.quant" not in plan(device(None)).kernels and "guidance" not in plan(device(None), job(1.0)).kernels


def test_the_text_encoder_on_the_cpu_has_kernels_of_a_cpu() -> None:
    made = plan(device(86), weights="int8", text_encoder_weights="int8", text_encoder_cpu=True)
    assert (made.kernels["transformer.linear"], made.kernels["text_encoder.linear"]) == ("triton", "reference")


@pytest.mark.parametrize("free", [6, 12, 48])
def test_kernels_never_depend_on_free_memory(free: int) -> None:
    on = replace(device(86), total_bytes=free * GIB, free_bytes=free * GIB)
    assert plan(on).kernels == plan(device(86)).kernels


def test_the_plan_says_why_when_it_is_asked() -> None:
    made = plan(device(86, triton="triton cannot be imported: pip install x"))
    assert made.passed_over["transformer.linear"] == {"triton": "triton cannot be imported: pip install x"}
    assert "cannot be imported" in as_text(made, explain=True) and "cannot be imported" not in as_text(made)
    assert "transformer.linear" in as_text(made) and "int_mm" in as_text(made)
    document = as_json(made)
    assert document["kernels"]["transformer.linear"] == "int_mm"
    assert document["passed_over"]["guidance"] == {"triton": "triton cannot be imported: pip install x"}


@pytest.mark.parametrize(
    ("pins", "expected"),
    [
        ({"guidance": "reference"}, {"guidance": "reference", "transformer.linear": "triton"}),
        ({"linear": "int_mm"}, {"transformer.linear": "int_mm", "text_encoder.linear": "int_mm"}),
        ({"linear_int8": "reference"}, {"transformer.linear": "reference", "text_encoder.linear": "reference"}),
        (
            {"linear": "reference", "transformer.linear": "int_mm"},
            {"transformer.linear": "int_mm", "text_encoder.linear": "reference"},
        ),
    ],
)
def test_a_pin_runs_where_it_is_meant(pins: dict[str, str], expected: dict[str, str]) -> None:
    made = plan(device(86), kernels=pins)
    assert expected.items() <= made.kernels.items()
    assert all(f"--kernel {op}={name}" in made.command for op, name in pins.items())


def test_a_pin_that_cannot_run_is_refused_with_every_reason() -> None:
    with pytest.raises(RequestError) as refused:
        plan(device(75), kernels={"transformer.modulate": "triton"})
    assert refused.value.exit_code == 2
    assert "triton: needs compute capability 8.0, not 7.5" in refused.value.message
    assert "reference: can run" in refused.value.message and "got 'triton'" in refused.value.message
    with pytest.raises(RequestError, match="kernels must name ops of this run .*guidance.*, got 'fft'"):
        plan(device(86), kernels={"fft": "triton"})
    with pytest.raises(RequestError, match="got 'linear_fp8'"):
        plan(device(86), kernels={"linear_fp8": "triton"})
    with pytest.raises(RequestError, match="kernels must leave attention to its own choice"):
        plan(device(86), kernels={"transformer.attention": "flash"})


@pytest.mark.parametrize("mode", LIBRARIES)
def test_M13_a_library_runs_where_it_is_and_is_refused_with_the_way_to_get_it_where_not(mode: str) -> None:
    assert plan(device(86), attention=mode).kernels["transformer.attention"] == mode
    assert f"--attn-mode {mode}" in plan(device(86), attention=mode).command
    with pytest.raises(
        RequestError, match=f"attention must be .*, got {mode}: x is not installed: pip install x"
    ) as no:
        plan(device(86, **{mode: "x is not installed: pip install x"}), attention=mode)
    assert no.value.exit_code == 2
    with pytest.raises(RequestError, match=f"got {mode}: needs a CUDA device, not cpu"):
        plan(device(None), attention=mode)


def test_M13_sage_and_flash_take_no_float32() -> None:
    for mode in ("flash", "sage"):
        with pytest.raises(RequestError, match="needs bfloat16, not float32"):
            plan(device(86), job(dtype="float32"), attention=mode)
    assert plan(device(86), job(dtype="float32")).kernels["transformer.attention"] == "sdpa-efficient"


def test_M13_the_other_names_mean_the_same() -> None:
    for alias, name in ALIASES.items():
        assert Choices(attention=alias) == Choices(attention=name)
    with pytest.raises(RequestError, match="attention must be one of sdpa, math, flash, xformers, sage, got 'fast'"):
        Choices(attention="fast")


def test_a_kernel_of_attention_that_holds_more_is_planned_for() -> None:
    sizes = {mode: plan(device(86), attention=mode).phase("denoise").vram_bytes for mode in ("sdpa", "sage", "math")}
    assert sizes["sdpa"] <= sizes["sage"] and sizes["sdpa"] < sizes["math"]


def test_the_products_to_try_are_those_of_the_formats_on_the_card() -> None:
    on = device(90)
    assert set(products(model(), job(), on, Choices())) == {"scaled_mm"}
    found = products(model(), job(), on, Choices(text_encoder_weights="int8"))
    assert set(found) == {"scaled_mm", "int_mm"}
    assert set(products(model(), job(), on, Choices(text_encoder_weights="int8", text_encoder_cpu=True))) == {
        "scaled_mm"
    }
    assert products(model(), job(), on, Choices(weights="bf16")) == {}
    assert products(model(), job(), device(None), Choices(weights="int8")) == {}
    dim = model().transformer.dim
    assert (dim, dim) in found["scaled_mm"] and (4 * dim, dim) in found["scaled_mm"]


def test_every_linear_implementation_has_a_scratch() -> None:
    for op in ("linear_int8", "linear_fp8"):
        for name in OPS[op]:
            assert activations.Linear(name, 2).scratch(100, 256, 512) >= 0


def test_the_plan_counts_the_chunks_that_kernels_work_in() -> None:
    from qengine.kernels.linear_fp8 import reference as fp8
    from qengine.kernels.linear_int8 import reference as int8
    from qengine.kernels.quant import reference as quant

    assert activations.CHUNK_SCORES == reference.CHUNK_SCORES
    assert (activations.CHUNK_ELEMENTS, activations.DEVICE_CHUNK_ELEMENTS) == (
        quant.CHUNK_ELEMENTS,
        quant.DEVICE_CHUNK_ELEMENTS,
    )
    assert activations.OUTPUT_COLUMNS == int8.CHUNK_ROWS == int8.EXACT_COLUMNS
    assert (activations.DEQUANTISED_ELEMENTS, activations.DEQUANTISED_ROWS) == (fp8.CHUNK_ELEMENTS, fp8.CHUNK_MULTIPLE)
