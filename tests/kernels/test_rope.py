"""RMS norm and rotation into a slice of the joint buffer."""

from __future__ import annotations

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels.rope import norm_rope_joint

from tests.kernels.counting import counted
from tests.kernels.rounding import rounded_as_on_a_card

triton = pytest.importorskip("triton")
from qengine.kernels.rope import reference  # noqa: E402
from qengine.kernels.rope import triton as fused  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 3, 5, 14), (2, 4, 3, 64), (1, 1, 1, 2), (1, 2, 24, 128), (1, 3, 33, 128)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LUCK = torch.finfo(torch.float32).eps
"""A result of few numbers may be exact by luck, and twice nothing is less than one rounding of float32."""


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_as_on_a_card(monkeypatch)


def made(shape, dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def turns(tokens: int, width: int) -> torch.Tensor:
    angles = torch.randn(tokens, width // 2) * 7
    return torch.polar(torch.ones_like(angles), angles).to(DEVICE)


def turned(x: torch.Tensor, weight: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """In float64, one pair after the other."""
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    cosine, sine = rotations.real.double()[:, None], rotations.imag.double()[:, None]
    out = torch.empty_like(y)
    out[..., 0::2] = y[..., 0::2] * cosine - y[..., 1::2] * sine
    out[..., 1::2] = y[..., 0::2] * sine + y[..., 1::2] * cosine
    return out


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fused_rotation_is_no_further_from_float64_than_twice_the_eager_one(shape, dtype, monkeypatch) -> None:
    batch, tokens, heads, width = shape
    x, weight, rotations = made(shape, dtype), made(width, dtype), turns(tokens, width)
    kernel = counted(monkeypatch, fused, "_norm_rope_kernel")
    joint = torch.full((batch, tokens + 3, heads, width), float("nan"), dtype=dtype, device=DEVICE)
    out = norm_rope_joint(x, weight, rotations, joint[:, 2:-1], implementation="triton")
    assert kernel.launches == 1
    assert out.data_ptr() == joint[:, 2:].data_ptr() and out.isfinite().all()
    assert joint[:, :2].isnan().all() and joint[:, -1].isnan().all()
    expected = turned(x, weight, rotations)
    eager = norm_rope_joint(x, weight, rotations, torch.full_like(x, float("nan")))
    assert error(out, expected) <= 2 * error(eager, expected) + LUCK


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_heads_and_tokens_may_lie_anywhere(implementation: str) -> None:
    joined = made((2, 5, 3 * 4 * 16), torch.float32).unflatten(-1, (3, 4, 16))
    queries = joined[:, :, 1]
    weight, rotations = made(16, torch.float32), turns(5, 16)
    place = torch.full((4, 2, 11, 16), float("nan"), device=DEVICE).permute(1, 2, 0, 3)[:, 1::2]
    norm_rope_joint(queries, weight, rotations, place, implementation=implementation)
    torch.testing.assert_close(place, turned(queries, weight, rotations).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_buffer_may_be_turned_where_it_lies(implementation: str, dtype) -> None:
    joint = made((1, 9, 3, 14), dtype)
    before, part = joint.clone(), joint[:, 2:7]
    weight, rotations = made(14, dtype), turns(5, 14)
    expected = norm_rope_joint(part, weight, rotations, torch.empty_like(part), implementation=implementation)
    assert norm_rope_joint(part, weight, rotations, part, implementation=implementation) is part
    assert torch.equal(part, expected)
    assert torch.equal(joint[:, :2], before[:, :2]) and torch.equal(joint[:, 7:], before[:, 7:])


def test_a_reference_in_pieces_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, rotations = made((1, 11, 3, 14), torch.bfloat16), made(14, torch.bfloat16), turns(11, 14)
    whole = norm_rope_joint(x, weight, rotations, torch.empty_like(x))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 4 * 3 * 14)
    assert torch.equal(norm_rope_joint(x, weight, rotations, torch.full_like(x, float("nan"))), whole)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy, at inf - inf
@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_spoils_itself_alone(implementation: str, bad: float) -> None:
    x = made((1, 2, 3, 8), torch.float32)
    x[0, 1, 2, 4] = bad
    out = norm_rope_joint(x, made(8, torch.float32), turns(2, 8), torch.empty_like(x), implementation=implementation)
    spoiled = out.isfinite().all(-1).logical_not()
    assert spoiled[0, 1, 2] and spoiled.sum() == 1


X, WEIGHT, TURNS = torch.zeros(1, 3, 2, 8), torch.zeros(8), torch.zeros(3, 4, dtype=torch.complex64)
WRONG = {
    "x must be float32, bfloat16 or float16 .*float64": (X.double(), WEIGHT.double(), TURNS, X.double()),
    r"x must be .*got torch.float32 \[3, 2, 8\]": (X[0], WEIGHT, TURNS, X[0]),
    "x must have tokens": (X[:, :0], WEIGHT, TURNS[:0], X[:, :0]),
    "even head_dim.*got shape .*7": (X[..., :7], WEIGHT[:7], TURNS, X[..., :7]),
    "even head_dim.*got shape .*258": (torch.zeros(1, 1, 1, 258), WEIGHT, TURNS, X),
    r"weight must be torch.float32 \[8\]": (X, WEIGHT[:4], TURNS, X),
    "weight must be .*got torch.bfloat16": (X, WEIGHT.bfloat16(), TURNS, X),
    r"rotations must be complex64 \[3, 4\]": (X, WEIGHT, TURNS[:2], X),
    "rotations must be complex64 .*got torch.complex128": (X, WEIGHT, TURNS.to(torch.complex128), X),
    "rotations must be contiguous": (X, WEIGHT, torch.zeros(4, 3, dtype=torch.complex64).t(), X),
    r"out must be torch.float32 \[1, 3, 2, 8\]": (X, WEIGHT, TURNS, X[:, :2]),
    "out must be .*got torch.bfloat16": (X, WEIGHT, TURNS, X.bfloat16()),
    "out must be .* on cpu, got .* on meta": (X, WEIGHT, TURNS, X.to("meta")),
    "x must have a dense head_dim, got stride 2": (torch.zeros(1, 3, 2, 16)[..., ::2], WEIGHT, TURNS, X),
    "out must have a dense head_dim, got stride 2": (X, WEIGHT, TURNS, torch.zeros(1, 3, 2, 16)[..., ::2]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_told(message: str) -> None:
    with pytest.raises(KernelError, match=message):
        norm_rope_joint(*WRONG[message])


def test_an_unknown_implementation_writes_nothing() -> None:
    out = torch.ones_like(X)
    with pytest.raises(KernelError, match="implementation must be one of reference, triton, got 'cuda'"):
        norm_rope_joint(X, WEIGHT, TURNS, out, implementation="cuda")
    assert torch.equal(out, torch.ones_like(X))


def test_triton_without_its_interpreter_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton, "JITFunction", type(fused._norm_rope_kernel))
    with pytest.raises(KernelError, match="x must be on a CUDA device for triton, got cpu"):
        norm_rope_joint(X, WEIGHT, TURNS, torch.empty_like(X), implementation="triton")
