"""Which implementation runs where, and what is said of those that cannot."""

from __future__ import annotations

import pytest
from qengine.errors import KernelError
from qengine.kernels.dispatch import OPS, Machine, choose, definition, reasons

CPU = Machine("cpu", native="")


def card(architecture: int, **fields) -> Machine:
    return Machine("cuda", architecture, **fields)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("machine", [CPU, card(75), card(86), card(120), card(90, dtype="float32")])
def test_every_op_runs_everywhere_and_its_definition_too(op: str, machine: Machine) -> None:
    found = reasons(op, machine)
    assert tuple(found) == OPS[op] and found[definition(op)] == ""
    made = choose(op, machine)
    assert found[made] == "" and all(found[name] for name in OPS[op][: OPS[op].index(made)])


@pytest.mark.parametrize(
    ("op", "architecture", "expected"),
    [
        ("linear_int8", 75, "int_mm"),
        ("linear_int8", 80, "triton"),
        ("linear_int8", 120, "triton"),
        ("linear_fp8", 75, "dequantise"),
        ("linear_fp8", 86, "triton-w8a16"),
        ("linear_fp8", 89, "scaled_mm"),
        ("linear_fp8", 90, "scaled_mm"),
        ("attention", 75, "sdpa-efficient"),
        ("attention", 86, "sdpa-flash"),
        ("modulate", 75, "reference"),
        ("modulate", 86, "triton"),
    ],
)
def test_the_architecture_decides(op: str, architecture: int, expected: str) -> None:
    assert choose(op, card(architecture)) == expected


def test_what_was_tried_decides_after_the_architecture() -> None:
    refused = card(90, unusable={"scaled_mm": "[17, 64] x [64, 64]: not supported"})
    assert choose("linear_fp8", refused) == "triton"
    assert choose("linear_fp8", card(90, triton="not installed", unusable=refused.unusable)) == "dequantise"
    assert choose("linear_int8", card(86, triton="not installed")) == "int_mm"
    assert choose("linear_int8", card(86, triton="not installed", unusable={"int_mm": "no"})) == "reference"
    assert choose("attention", card(86, dtype="float32")) == "sdpa-efficient"
    assert choose("attention", card(86, unusable={"sdpa-flash": "was not built"})) == "sdpa-efficient"
    both = {"sdpa-flash": "was not built", "sdpa-efficient": "was not built"}
    assert choose("attention", card(86, unusable=both)) == "math"


def test_native_is_for_a_cpu_that_has_it() -> None:
    assert choose("quant", CPU) == "native" and choose("quant", Machine("cpu", native="not built")) == "reference"
    assert reasons("quant", card(86))["native"] == "runs on a CPU, not on cuda"


def test_a_pin_runs_or_names_the_reason_of_each() -> None:
    assert choose("guidance", card(86), "reference") == "reference"
    with pytest.raises(KernelError) as refused:
        choose("linear_fp8", card(86, triton="triton cannot be imported"), "triton")
    said = refused.value.message
    assert "scaled_mm: needs compute capability 8.9, not 8.6" in said and "dequantise: can run" in said
    assert "triton: needs compute capability 8.9" in said and said.endswith("got 'triton'")
    with pytest.raises(KernelError, match="got 'cuda'"):
        choose("guidance", card(86), "cuda")
    with pytest.raises(KernelError, match="op must be one of"):
        choose("fft", CPU)
