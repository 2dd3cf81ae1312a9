"""Guidance that keeps the norm of the positive prediction."""

from __future__ import annotations

import math

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels.guidance import combine

from tests.kernels.counting import counted

triton = pytest.importorskip("triton")
from qengine.kernels.guidance import triton as fused  # noqa: E402

SHAPES = [(1, 423, 64), (2, 5, 3), (1, 64), (7, 213), (1, 1, 1), (33, 64), (2, 1030)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LUCK = torch.finfo(torch.float32).eps
"""A result of few numbers may be exact by luck, and twice nothing is less than one rounding of float32."""


def pair(shape) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)


def combined(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    p, n = positive.double(), negative.double()
    made = n + scale * (p - n)
    return made * p.norm(dim=-1, keepdim=True) / made.norm(dim=-1, keepdim=True)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [1.0, 4.0, -0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_one_is_no_further_from_float64_than_twice_the_eager_one(shape, scale: float, monkeypatch) -> None:
    kernel = counted(monkeypatch, fused, "_combine_kernel")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    positive, negative = pair(shape)
    expected = combined(positive, negative, scale)
    out = combine(positive, negative, scale, implementation="triton")
    assert kernel.launches == 1 and out.shape == positive.shape
    assert error(out, expected) <= 2 * error(combine(positive, negative, scale), expected) + LUCK


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_strided_predictions_are_read_as_they_lie(implementation: str) -> None:
    positive, negative = (x.transpose(1, 2)[:, ::2] for x in pair((1, 6, 14)))
    out = combine(positive, negative, 3.0, implementation=implementation)
    torch.testing.assert_close(out, combined(positive, negative, 3.0).float())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_token_of_norm_zero_stays_zero_and_another_keeps_its_norm(implementation: str) -> None:
    positive, negative = pair((1, 3, 8))
    negative[0, 1] = 0
    positive[0, 1] = 0
    negative[0, 2] = 2 * positive[0, 2]
    out = combine(positive, negative, 2.0, implementation=implementation)
    assert torch.equal(out[0, 1:], torch.zeros_like(out[0, 1:]))
    torch.testing.assert_close(out[0, 0].norm(), positive[0, 0].norm())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_where_it_is_seen(implementation: str, side: int) -> None:
    given = pair((1, 2, 8))
    given[side][0, 1, 5] = math.nan
    out = combine(*given, 4.0, implementation=implementation)
    assert out[0, 1, 5].isnan() and out[0, 0].isfinite().all()


X = torch.zeros(1, 4, 8)
WRONG = {
    "positive must be float32 .*got torch.bfloat16": (X.bfloat16(), X.bfloat16(), 1.0),
    r"positive must be .*got torch.float32 \[1, 0, 8\]": (X[:, :0], X[:, :0], 1.0),
    "positive must be .*8193": (torch.zeros(1, 8193), torch.zeros(1, 8193), 1.0),
    r"negative must be torch.float32 \[1, 4, 8\] .*got torch.float32 \[1, 3, 8\]": (X, X[:, :3], 1.0),
    "negative must be .*got torch.float64": (X, X.double(), 1.0),
    "negative must be .*got .* on meta": (X, X.to("meta"), 1.0),
    "scale must be finite, got nan": (X, X, math.nan),
    "scale must be finite, got inf": (X, X, math.inf),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_told(message: str) -> None:
    with pytest.raises(KernelError, match=message):
        combine(*WRONG[message])


def test_an_unknown_implementation_is_told() -> None:
    with pytest.raises(KernelError, match="implementation must be one of reference, triton, got 'native'"):
        combine(X, X, 1.0, implementation="native")


def test_triton_without_its_interpreter_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton, "JITFunction", type(fused._combine_kernel))
    with pytest.raises(KernelError, match="positive must be on a CUDA device for triton, got cpu"):
        combine(X, X, 1.0, implementation="triton")
