"""Start-up trials with fakes: what a library cannot do is told from memory that ran out, and asked for once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from qengine.engine import probes
from qengine.errors import PlanError

CPU = "cpu"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No trial is remembered, and a CPU can make the product that a card would."""
    trials = (probes.product, probes.triton, probes._attention)
    for trial in trials:
        trial.cache_clear()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    yield
    for trial in trials:
        trial.cache_clear()


def scaled(a, b, *, scale_a, scale_b, bias, out_dtype, use_fast_accum):
    assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1]) and not use_fast_accum
    return ((a.float() @ b.float()) * scale_a * scale_b + bias.float()).to(out_dtype)


def test_a_product_that_works_is_tried_at_every_number_of_tokens_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []

    def counted(a, b, **options):
        tokens.append(len(a))
        return scaled(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    assert probes.product(CPU, "scaled_mm", 96, 64) == probes.product(CPU, "scaled_mm", 96, 64) == ""
    assert tokens == list(probes.ROWS)


def test_what_a_library_does_not_support_is_told_with_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(a, b, **options):
        if len(a) <= 256 and b.shape == (192, 64):
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling\n cublasLtMatmul")
        return scaled(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    assert probes.product(CPU, "scaled_mm", 64, 64) == ""
    said = probes.product(CPU, "scaled_mm", 64, 192)
    assert said == "[17, 192] x [192, 64]: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"


def test_wrong_sums_are_no_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, **options: scaled(a, b, **options) * 1.05)
    assert "gives wrong sums" in probes.product(CPU, "scaled_mm", 64, 64)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
    assert "gives wrong sums" in probes.product(CPU, "int_mm", 64, 64)


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (30, 50)])
def test_torch_multiplies_whole_numbers_of_8_bits(rows: int, columns: int) -> None:
    assert probes.product(CPU, "int_mm", rows, columns) == ""


def test_memory_that_runs_out_says_nothing_of_support_and_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [2, 0]

    def short(a, b, **options):
        if failures[0]:
            failures[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scaled(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", short)
    with pytest.raises(PlanError, match=r"device memory must be enough to try scaled_mm of \[17, 64\] x \[64, 64\]"):
        probes.product(CPU, "scaled_mm", 64, 64)
    failures[0] = 1
    assert probes.product(CPU, "scaled_mm", 64, 64) == ""


def test_triton_that_cannot_be_imported_is_told_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton cannot be imported" in probes.triton() and "pip install" in probes.triton()


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "product", lambda *_: pytest.fail("a product was tried"))
    monkeypatch.setattr(probes, "triton", lambda: pytest.fail("triton was imported"))
    found = probes.unusable(torch.device("cpu"), "sdpa", {"int_mm": {(64, 64)}})
    assert set(found) <= {"native", "flash", "xformers", "sage"}


def test_only_the_library_that_is_asked_for_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", ModuleType("sageattention"))
    assert "sage" not in probes.unusable(torch.device("cpu"), "sdpa", {})
    assert "has no sageattn" in probes.unusable(torch.device("cpu"), "sage", {})["sage"]
