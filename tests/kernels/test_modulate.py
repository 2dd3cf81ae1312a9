"""LayerNorm with modulation and the gated residual over two ranges of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from qengine.errors import KernelError
from qengine.kernels.modulate import MAX_COLUMNS, add_gated, modulate

from tests.kernels.counting import counted
from tests.kernels.rounding import rounded_as_on_a_card

triton = pytest.importorskip("triton")
from qengine.kernels.modulate import triton as fused  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 423), (2, 5, 64), (1, 1, 1), (1, 1, 213), (3, 1, 2), (1, 4, 1540)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LUCK = torch.finfo(torch.float32).eps
"""A result of few numbers may be exact by luck, and twice nothing is less than one rounding of float32."""


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_as_on_a_card(monkeypatch)


def made(shape, dtype, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * spread).to(DEVICE, dtype)


def rows(width: int, dtype, count: int) -> list[torch.Tensor]:
    return [made(width, dtype) for _ in range(count)]


def modulated(x, shift, scale, rest, split) -> torch.Tensor:
    """In float64, from the very numbers that the op is given."""
    first = per_token(x, split)
    add, factor = (torch.where(first, a.double(), b.double()) for a, b in zip((shift, scale), rest, strict=True))
    return F.layer_norm(x.double(), x.shape[-1:], eps=1e-6) * (1 + factor) + add


def per_token(x: torch.Tensor, split: int) -> torch.Tensor:
    return (torch.arange(x.shape[1], device=x.device) < split)[None, :, None]


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_norm_is_no_further_from_float64_than_twice_the_eager_one(shape, dtype, monkeypatch) -> None:
    x = made(shape, dtype) + 3
    shift, scale, *rest = rows(shape[-1], dtype, 4)
    kernel = counted(monkeypatch, fused, "_modulate_kernel")
    for split in {0, shape[1] // 2, shape[1]}:
        arguments = (x, shift, scale, tuple(rest), split)
        expected = modulated(*arguments)
        out = modulate(*arguments, implementation="triton")
        assert out.dtype == dtype and out.is_contiguous() and out.isfinite().all()
        assert error(out, expected) <= 2 * error(modulate(*arguments), expected) + LUCK
    assert kernel.launches == len({0, shape[1] // 2, shape[1]})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_gated_residual_is_the_eager_one(shape, dtype, monkeypatch) -> None:
    x, update = made(shape, dtype), made(shape, dtype, 5)
    gate, rest = rows(shape[-1], dtype, 2)
    kernel = counted(monkeypatch, fused, "_add_gated_kernel")
    for split in {0, shape[1] // 2, shape[1]}:
        picked = torch.where(per_token(x, split), gate.double(), rest.double())
        expected = x.double() + picked * update.double()
        eager = add_gated(x.clone(), update, gate, rest, split)
        given = x.clone()
        out = add_gated(given, update, gate, rest, split, implementation="triton")
        assert out is given
        assert error(out, expected) <= 2 * error(eager, expected) + LUCK
    assert kernel.launches == len({0, shape[1] // 2, shape[1]})


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_one_pair_of_rows_serves_all_tokens(implementation: str) -> None:
    x, update = made((1, 7, 48), torch.float32), made((1, 7, 48), torch.float32)
    shift, scale, other = rows(48, torch.float32, 3)
    alone = modulate(x, shift, scale, implementation=implementation)
    assert torch.equal(alone, modulate(x, shift, scale, (other, other), 7, implementation=implementation))
    added = add_gated(x.clone(), update, shift, implementation=implementation)
    assert torch.equal(added, add_gated(x.clone(), update, shift, other, 7, implementation=implementation))


def test_strided_tokens_are_read_in_place_and_what_lies_between_them_is_left_alone() -> None:
    whole = torch.full((2, 12, 40), float("nan"), device=DEVICE)
    x = whole[:, 1:10:2]
    x.copy_(made(x.shape, torch.float32))
    update = made((2, 9, 40), torch.float32)[:, 2:7]
    shift, scale = rows(40, torch.float32, 2)
    for implementation in ("reference", "triton"):
        out = modulate(x, shift, scale, implementation=implementation)
        torch.testing.assert_close(out, modulate(x.contiguous(), shift, scale))
    expected = x + scale * update
    add_gated(x, update, scale, implementation="triton")
    torch.testing.assert_close(x, expected)
    assert whole[:, 0::2].isnan().all() and whole[:, 11].isnan().all()


def test_every_element_of_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    x = made((2, 3, 423), torch.bfloat16)
    out = modulate(x, *rows(423, torch.bfloat16, 2), implementation="triton")
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy, at inf - inf
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_itself_alone(implementation: str, bad: float) -> None:
    x = made((1, 3, 20), torch.float32)
    x[0, 1, 4] = bad
    out = modulate(x, *rows(20, torch.float32, 2), implementation=implementation)
    assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()


X = torch.zeros(1, 4, 6)
ROW = torch.zeros(6)
WRONG = {
    "x must be float32, bfloat16 or float16 .*float64": (X.double(), ROW.double(), ROW.double()),
    r"x must be .* got torch.float32 \[4, 6\]": (X[0], ROW, ROW),
    "x must have tokens": (X[:, :0], ROW, ROW),
    f"1 to {MAX_COLUMNS} channels": (torch.zeros(1, 1, MAX_COLUMNS + 1), ROW, ROW),
    "x must have dense channels, got stride 4": (torch.zeros(1, 6, 4).transpose(1, 2), ROW, ROW),
    r"shift must be torch.float32 \[6\] on cpu, got torch.float32 \[5\]": (X, ROW[:5], ROW),
    "scale must be torch.float32 .*got torch.bfloat16": (X, ROW, ROW.bfloat16()),
    "scale must be .*got .* on meta": (X, ROW, ROW.to("meta")),
    "shift must be contiguous, got stride 2": (X, torch.zeros(12)[::2], ROW),
    "rest shift must be": (X, ROW, ROW, (ROW[:1], ROW), 2),
    "rest scale must be": (X, ROW, ROW, (ROW, ROW[:1]), 2),
    "given together, got rest alone": (X, ROW, ROW, (ROW, ROW)),
    "given together, got split alone": (X, ROW, ROW, None, 2),
    "split must be 0 to 4 tokens, got 5": (X, ROW, ROW, (ROW, ROW), 5),
    "split must be 0 to 4 tokens, got -1": (X, ROW, ROW, (ROW, ROW), -1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_of_the_norm_are_told(message: str) -> None:
    with pytest.raises(KernelError, match=message):
        modulate(*WRONG[message])


def test_wrong_arguments_of_the_residual_are_told_and_nothing_is_written() -> None:
    x = torch.ones(1, 4, 6)
    wrong = {
        r"update must be .*\[1, 4, 6\].* got .*\[1, 3, 6\]": (x, X[:, :3], ROW),
        "update must be .* got torch.bfloat16": (x, X.bfloat16(), ROW),
        "gate must be": (x, X, ROW[:2]),
        "rest gate must be": (x, X, ROW, ROW[:2], 1),
        "split must be": (x, X, ROW, ROW, 9),
    }
    for message, arguments in wrong.items():
        with pytest.raises(KernelError, match=message):
            add_gated(*arguments)
    with pytest.raises(KernelError, match="implementation must be one of reference, triton, got 'cuda'"):
        add_gated(x, X, ROW, implementation="cuda")
    with pytest.raises(KernelError, match="implementation"):
        modulate(x, ROW, ROW, implementation="native")
    assert torch.equal(x, torch.ones(1, 4, 6))


def test_triton_without_its_interpreter_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton, "JITFunction", type(fused._modulate_kernel))
    with pytest.raises(KernelError, match="x must be on a CUDA device for triton, got cpu"):
        modulate(X, ROW, ROW, implementation="triton")
    with pytest.raises(KernelError, match="x must be on a CUDA device for triton, got cpu"):
        add_gated(torch.zeros_like(X), X, ROW, implementation="triton")
