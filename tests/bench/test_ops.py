"""Measuring an op: gated on correctness, in turns with its rival, against a limit measured beside it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qengine.bench import limits, ops
from qengine.bench.clock import enough_calls
from qengine.bench.rivals import duel, in_turns
from qengine.errors import KernelError

CPU = torch.device("cpu")


class Benchmark:
    """As much of pytest-benchmark's fixture as is used."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.calls = 0

    def pedantic(self, run: Callable[[], object], rounds: int) -> None:
        self.calls += rounds
        run()


def doubling(call: Callable[[torch.Tensor], torch.Tensor], **other: Any) -> ops.Maker:
    def make(device: torch.device, generator: torch.Generator) -> ops.Case:
        x = torch.randn(3, 423, generator=generator, device=device)
        options = {"limit": "copy", "work": 2 * x.nbytes, "bound": 1e-6} | other
        return ops.Case(lambda: call(x), 2 * x.double(), lambda: x + x, **options)

    return make


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An op named ``double`` whose module is this."""
    module = SimpleNamespace(CASES={})
    monkeypatch.setattr(ops, "names", lambda: ("double",))
    monkeypatch.setattr(ops, "import_module", lambda name, package: module)
    return module


def test_a_right_kernel_is_timed_beside_its_rival_and_its_limit(op: SimpleNamespace) -> None:
    op.CASES = {"3x423": doubling(lambda x: x * 2, implementation="triton")}
    benchmark = Benchmark()
    ops.measure(benchmark, "double", "3x423")
    info = benchmark.extra_info
    assert (info["op"], info["case"], info["implementation"]) == ("double", "3x423", "triton")
    assert info["error"] == 0 and info["bound"] == 1e-6 and benchmark.calls
    assert info["limit"] in ("copy", "copy memmove")
    for name in ("ours_seconds", "rival_seconds", "speedup", "limit_seconds", "fraction_of_limit"):
        assert 0 < info[name] < float("inf")


def test_a_product_is_held_against_the_best_of_the_library(op: SimpleNamespace) -> None:
    op.CASES = {"small": doubling(lambda x: x * 2, limit="gemm", work=(8, 16, 32))}
    benchmark = Benchmark()
    ops.measure(benchmark, "double", "small")
    assert benchmark.extra_info["limit"] in ("gemm float32", "gemm bf16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x * 2.001, "error of double 3x423 must be at most 1e-06, got 0.0005"),
        (lambda x: torch.full_like(x, torch.nan), "must be at most 1e-06, got nan"),
        (lambda x: torch.zeros_like(x), "must be at most 1e-06, got 1 "),
        (lambda x: x[:2] * 2, r"double 3x423 must give \[3, 423\], got \[2, 423\]"),
    ],
)
def test_a_wrong_kernel_is_not_timed(op: SimpleNamespace, call: Any, message: str) -> None:
    op.CASES = {"3x423": doubling(call)}
    benchmark = Benchmark()
    with pytest.raises(KernelError, match=message):
        ops.measure(benchmark, "double", "3x423")
    assert not benchmark.calls and not benchmark.extra_info


def test_equality_is_asked_for_by_a_bound_of_0(op: SimpleNamespace) -> None:
    op.CASES = {"same": doubling(lambda x: x * 2, bound=0.0), "near": doubling(lambda x: x * 2.000001, bound=0.0)}
    assert ops.check("double", "same", CPU)[1]["error"] == 0
    with pytest.raises(KernelError, match="must be at most 0"):
        ops.check("double", "near", CPU)


def test_inputs_are_fresh_each_time(op: SimpleNamespace) -> None:
    op.CASES = {"3x423": doubling(lambda x: x * 2)}
    seeds = {ops.check("double", "3x423", CPU)[1]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_large_cases_are_listed_on_a_card_alone(op: SimpleNamespace) -> None:
    op.CASES = {"small": doubling(lambda x: x), "large": doubling(lambda x: x)}
    op.LARGE = {"large"}
    assert ops.listed("double", CPU) == ("small",)
    assert ops.listed("double", torch.device("cuda", 0)) == ("small", "large")


def test_an_unknown_op_and_work_that_fits_no_limit_are_errors(op: SimpleNamespace) -> None:
    with pytest.raises(KernelError, match="op must be one of double, got 'treble'"):
        ops.cases("treble")
    op.CASES = {"odd": doubling(lambda x: x * 2, work=(1, 2, 3))}
    case, _ = ops.check("double", "odd", CPU)
    with pytest.raises(KernelError, match=r"work must be bytes for copy and \(M, N, K\) for gemm"):
        ops.timings(case, CPU, 0.01)


def test_error_is_0_for_equal_zeros_and_nan_for_nan() -> None:
    assert ops.error(torch.zeros(3), torch.zeros(3)) == 0
    assert not ops.error(torch.full((3,), torch.nan), torch.ones(3)) <= 1e9
    assert ops.error(torch.tensor([1.1]), torch.tensor([1.0])) == pytest.approx(0.1)


def test_every_op_has_cases_and_the_files_of_benchmarks_run_them() -> None:
    for name in ops.names():
        assert ops.cases(name) and set(ops.listed(name, CPU)) <= set(ops.cases(name))
        assert ops.listed(name, CPU), f"{name} must have a case that a CPU can run"


def test_a_copy_moves_half_its_bytes_in_and_half_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x: made.append(empty_like(x)) or made[-1])
    for name, run in limits.copies(1 << 16, CPU).items():
        made[0].zero_()
        run()
        assert made[0].numel() == 1 << 15 and made[0].count_nonzero() > 1 << 14, name


def test_a_product_that_a_library_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
        def run() -> object:
            raise NotImplementedError("no such product")

        return run

    monkeypatch.setattr(limits, "PRODUCTS", dict(limits.PRODUCTS) | {"bf16": missing})
    assert set(limits.gemms(8, 16, 32, CPU)) == {"float32"}


@pytest.mark.parametrize(("name", "bound"), [("float32", 1e-6), ("bf16", 5e-3), ("int8", 2e-2)])
def test_the_products_are_products(name: str, bound: float) -> None:
    """int8 rounds normal values to thirtieths and cuts them at 4.2: that costs more than a hundredth."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 64, generator=generator), torch.randn(16, 64, generator=generator)
    found = limits.PRODUCTS[name](x, weight)()
    assert isinstance(found, torch.Tensor)
    scale = 900 if name == "int8" else 1
    assert ops.error(found.double() / scale, x.double() @ weight.double().t()) < bound


def test_rivals_run_in_turns_as_often_as_each_other() -> None:
    calls: list[str] = []
    found = duel(lambda: calls.append("a"), lambda: calls.append("b"), rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4 and len(found.ours) == len(found.theirs) == 3 and found.speedup > 0


def test_short_calls_are_repeated_until_the_clock_can_tell_them() -> None:
    calls: list[str] = []
    in_turns((lambda: calls.append("a"),), rounds=1, warmup=1, calls=None)
    assert len(calls) > 100
    assert enough_calls(1.0, CPU) == 1 and enough_calls(1e-9, torch.device("cuda")) < 10 < enough_calls(1e-5, CPU)
