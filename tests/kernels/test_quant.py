"""Rotation, 8-bit rows and the two linear layers over them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qengine.errors import KernelError
from qengine.kernels.linear_fp8 import linear_fp8
from qengine.kernels.linear_fp8 import reference as fp8
from qengine.kernels.linear_int8 import linear_int8
from qengine.kernels.linear_int8 import reference as int8
from qengine.kernels.quant import (
    GROUPS,
    dequantise_rows,
    make_tokens,
    quantise_rows,
    quantise_tokens,
    reference,
    rotate,
)

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
SHAPES = [(1, 4, 1), (3, 423, 213), (7, 36, 5), (5, 192, 19), (33, 1280, 64), (2, 1, 3)]
"""(tokens, columns, rows of the weight): columns that 1, 4, 64 and 256 divide, one token, one column."""

FLOATS = [torch.float32, torch.bfloat16]


def matrix(group: int) -> torch.Tensor:
    """The regular Hadamard matrix by its definition, float64."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < group:
        h = torch.kron(H4, h)
    return h


def largest_group(columns: int) -> int:
    return max(group for group in GROUPS if columns % group == 0)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float tensor that the ops allocate is NaN at first, and every int8 tensor -128."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -128)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.mark.parametrize("group", GROUPS)
def test_rotation_is_the_regular_hadamard_matrix_in_float32(group: int) -> None:
    h = matrix(group)
    assert torch.equal(h, h.t()) and torch.equal(h @ h, torch.eye(group, dtype=torch.float64))
    assert torch.equal(h.sum(0), torch.ones(group, dtype=torch.float64))
    x = torch.randn(3, 5, 3 * group)
    exact = x.double() @ torch.block_diag(h, h, h)
    eager = x @ torch.block_diag(h, h, h).float()
    found = rotate(x, group)
    assert found.dtype == torch.float32 and found.shape == x.shape
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert torch.allclose(rotate(found, group), x, atol=2e-6)


def test_the_sylvester_matrix_would_be_found_out() -> None:
    sylvester = torch.ones(1, 1)
    while len(sylvester) < 256:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester) / 2**0.5
    x = torch.randn(4, 256)
    assert relative(rotate(x, 256), x @ sylvester) > 1


def test_rotation_takes_any_layout_and_leaves_its_argument() -> None:
    x = torch.randn(256, 6).t()
    kept = x.clone()
    assert torch.equal(rotate(x, 64), rotate(kept, 64)) and torch.equal(x, kept)
    assert torch.equal(rotate(x.bfloat16(), 64), rotate(x.bfloat16().float(), 64))
    assert torch.equal(rotate(torch.randn(0, 64), 64), torch.empty(0, 64))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(213, 423), (19, 192), (64, 1280), (1, 36), (5, 1)])
def test_stored_rows_are_the_nearest_of_their_scale(weight_format: str, dtype, rows: int, columns: int) -> None:
    weight = torch.randn(columns, rows).to(dtype).t()
    group = largest_group(columns)
    stored, scale = quantise_rows(weight, weight_format, group)
    turned = rotate(weight, group) if weight_format == "int8" else weight.float()
    limit = 127 if weight_format == "int8" else 448
    assert scale.dtype == torch.float32 and torch.equal(scale, turned.abs().amax(1) / limit)
    value = stored.double() * scale[:, None].double()
    error = (value - turned.double()).abs()
    if weight_format == "int8":
        assert (error <= scale[:, None] * 0.50001).all() and stored.min() >= -127
    else:
        assert (error <= turned.abs() * 2**-4 * 1.000001 + scale[:, None] * 2**-10).all()
    back = dequantise_rows(stored, scale, group)
    assert relative(back, weight.float()) < (0.01 if weight_format == "int8" else 0.04)
    undo = torch.block_diag(*[matrix(group)] * (columns // group)) if weight_format == "int8" else torch.eye(columns)
    assert torch.allclose(back.double(), value @ undo.double(), atol=1e-6)
    assert torch.equal(dequantise_rows(stored, scale, group, torch.bfloat16), back.bfloat16())


def test_halves_round_to_even_and_the_scale_divides_as_it_is_stored() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantise_rows(row, "int8", 1)[0].tolist() == [[127, 0, 2, 2, 0, -2]]
    weight = torch.randn(40, 64)
    stored, scale = quantise_rows(weight, "int8", 1, scale_dtype=torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    assert torch.equal(stored, (weight / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8))
    late = (weight / (weight.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8)
    assert not torch.equal(stored, late)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_rows_of_zeros_and_of_tiny_numbers_survive(weight_format: str) -> None:
    weight = torch.zeros(4, 16)
    weight[1] = 1e-45
    weight[2] = 1e-38
    weight[3] = 3e38 / 4
    stored, scale = quantise_rows(weight, weight_format, 4)
    assert scale[0] == 1 and (scale > 0).all() and not stored[0].float().any()
    assert dequantise_rows(stored, scale, 4).isfinite().all()
    assert torch.allclose(dequantise_rows(stored, scale, 4)[3], weight[3], rtol=0.07)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_chunks_of_rows_change_nothing(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(23, 192)
    whole = quantise_rows(weight, weight_format, 64)
    back = dequantise_rows(*whole, 64)
    for elements in (1, 192, 1000):
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
        pieces = quantise_rows(weight, weight_format, 64)
        assert torch.equal(pieces[0].view(torch.uint8), whole[0].view(torch.uint8)) and torch.equal(pieces[1], whole[1])
        assert torch.equal(dequantise_rows(*pieces, 64), back)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(weight_format: str, bad: float) -> None:
    weight = torch.randn(6, 16)
    weight[3, 5] = bad
    with pytest.raises(KernelError, match=rf"weight must be finite, got {bad} in row 3, column 5"):
        quantise_rows(weight, weight_format, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotate(torch.randn(2, 16), 2), "group must be one of 1, 4, 16, 64, 256, got 2"),
        (lambda: rotate(torch.randn(2, 18), 4), "positive multiple of the group 4, got 18"),
        (lambda: rotate(torch.ones(2, 4, dtype=torch.int8), 4), "x must be one of float32"),
        (lambda: quantise_rows(torch.randn(4), "int8", 1), "weight must be a matrix"),
        (lambda: quantise_rows(torch.randn(4, 4), "int4", 1), "weight_format must be one of int8, fp8, got 'int4'"),
        (lambda: quantise_rows(torch.randn(4, 0), "int8", 1), "positive multiple"),
        (lambda: quantise_rows(torch.randn(4, 4), "int8", 1, scale_dtype=torch.float16), "scale_dtype must be"),
        (lambda: dequantise_rows(torch.zeros(4, 4), torch.ones(4), 1), "stored must be one of int8"),
        (lambda: dequantise_rows(torch.zeros(4, 4).char(), torch.ones(4, 1), 1), r"scale must be .* \[4\]"),
        (lambda: linear(torch.randn(2, 5), "int8"), "weight must have the 5 columns of x"),
        (lambda: linear(torch.randn(2, 5), "fp8"), "weight must have the 5 columns of x"),
        (lambda: linear(torch.randn(2, 4).half(), "int8"), "x must be float32 or bfloat16"),
        (lambda: linear(torch.randn(2, 4), "fp8", torch.ones(3).bfloat16()), "bias must be torch.float32"),
        (lambda: linear(torch.randn(2, 4), "int8", torch.ones(2)), r"bias must be float32 or bfloat16 \[3\]"),
        (lambda: linear(torch.randn(2, 4), "fp8", None, "fast"), "implementation must be one of dequantise, scaled_mm"),
        (lambda: linear(torch.randn(2, 4), "fp8", None, "scaled_mm"), "device must be CUDA of capability 8.9"),
    ],
)
def test_what_an_op_does_not_take_is_an_error(call, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


def linear(x: torch.Tensor, weight_format: str, bias: torch.Tensor | None = None, path="dequantise") -> torch.Tensor:
    stored, scale = quantise_rows(torch.randn(3, 4), weight_format, 4)
    if weight_format == "int8":
        return linear_int8(x, stored, scale, bias, 4)
    return linear_fp8(x, stored, scale, bias, path)


@given(st.integers(0, 20), st.integers(1, 70), st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=40)
def test_integer_products_are_exact_both_ways(m: int, k: int, n: int, extreme: bool) -> None:
    k *= 31
    a, b = (torch.randint(-128, 128, (side, k), dtype=torch.int8) for side in (m, n))
    if extreme:
        a, b = a.fill_(-128), b.fill_(-128)
    exact = (a.long() @ b.long().t()).int()
    assert torch.equal(int8.products_in_floats(a, b), exact)
    assert torch.equal(int8.products_padded(a, b), exact)


def test_integer_products_are_exact_where_one_float_sum_is_not() -> None:
    a = torch.full((2, 12288), 127, dtype=torch.int8)
    a[1, ::3] = 126
    b = torch.full((3, 12288), -127, dtype=torch.int8)
    exact = a.long() @ b.long().t()
    assert exact.abs().max() > 1 << 24 and not torch.equal((a.float() @ b.float().t()).long(), exact)
    assert torch.equal(int8.products_in_floats(a, b).long(), exact)
    assert torch.equal(int8.products_padded(a, b).long(), exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_linear_is_its_definition_on_dequantised_tensors(m: int, k: int, n: int, dtype, with_bias: bool) -> None:
    group = largest_group(k)
    x = torch.randn(k, m).t().to(dtype).reshape(m, 1, k)
    stored, scale = quantise_rows(torch.randn(n, k), "int8", group)
    bias = torch.randn(n).to(dtype) if with_bias else None
    tokens, token_scale = quantise_tokens(x[:, 0], "int8", group)
    sums = (tokens.double() @ stored.double().t()).float()
    exact = sums * token_scale[:, None] * scale
    exact = exact if bias is None else exact + bias.float()
    found = linear_int8(x, stored, scale, bias, group)
    assert found.shape == (m, 1, n) and found.dtype == dtype
    assert torch.equal(found[:, 0], exact.to(dtype))
    values = (tokens.double() * token_scale[:, None].double()) @ (stored.double() * scale[:, None].double()).t()
    assert torch.allclose(exact.double(), values + (0 if bias is None else bias.double()), rtol=1e-5, atol=1e-5)


def test_int8_linear_is_within_two_percent_on_gaussians_and_rotation_helps_with_outliers() -> None:
    x, weight = torch.randn(64, 1024), torch.randn(128, 1024)
    outliers = x.clone()
    outliers[:, ::101] *= 60
    errors = {}
    for name, tokens in (("gaussian", x), ("outliers", outliers)):
        for group in (1, 256):
            stored, scale = quantise_rows(weight, "int8", group)
            found = linear_int8(tokens, stored, scale, None, group)
            errors[name, group] = relative(found, tokens.double() @ weight.double().t())
    assert 0.005 < errors["gaussian", 256] < 0.02 and errors["gaussian", 1] < 0.02, errors
    assert errors["outliers", 1] > 2 * errors["outliers", 256] and errors["outliers", 256] < 0.025, errors


def test_no_token_sees_another_and_no_place_of_the_weights_matters() -> None:
    x, weight = torch.randn(37, 1280), torch.randn(70, 1280)
    stored, scale = quantise_rows(weight, "int8", 256)
    whole = linear_int8(x, stored, scale, None, 256)
    for rows in (slice(0, 1), slice(5, 6), slice(3, 20), slice(36, 37)):
        assert torch.equal(linear_int8(x[rows], stored, scale, None, 256), whole[rows])
    raw = torch.zeros(stored.numel() + 3, dtype=torch.int8)
    moved = raw[3:].view(stored.shape).copy_(stored)
    assert torch.equal(linear_int8(x, moved, scale, None, 256), whole)
    assert torch.equal(linear_int8(x, stored[:9], scale[:9], None, 256), whole[:, :9])


def test_int8_chunks_of_output_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(5, 192), torch.randn(70)
    stored, scale = quantise_rows(torch.randn(70, 192), "int8", 64)
    whole = linear_int8(x, stored, scale, bias, 64)
    monkeypatch.setattr(int8, "CHUNK_ROWS", 16)
    assert torch.equal(linear_int8(x, stored, scale, bias, 64), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", [1, 64])
def test_a_token_that_is_not_finite_spoils_its_own_row_alone(bad: float, group: int) -> None:
    x = torch.randn(4, 64)
    stored, scale = quantise_rows(torch.randn(9, 64), "int8", group)
    clean = linear_int8(x, stored, scale, None, group)
    x[2, 7] = bad
    found = linear_int8(x, stored, scale, None, group)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_fp8_linear_is_the_linear_of_dequantised_weights(m: int, k: int, n: int, dtype) -> None:
    x, bias = torch.randn(k, m).t().to(dtype), torch.randn(n).to(dtype)
    stored, scale = quantise_rows(torch.randn(n, k), "fp8", 1)
    weight = (stored.float() * scale[:, None]).to(dtype)
    found = linear_fp8(x[None], stored, scale, bias)
    assert found.shape == (1, m, n) and torch.equal(found, F.linear(x[None], weight, bias))
    assert torch.equal(linear_fp8(x, stored, scale, None), F.linear(x, weight))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS)
def test_fp8_linear_in_chunks_is_as_near_as_the_eager_layer(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias = torch.randn(2, 9, 423).to(dtype), torch.randn(700).to(dtype)
    stored, scale = quantise_rows(torch.randn(700, 423), "fp8", 1)
    weight = (stored.float() * scale[:, None]).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    eager = F.linear(x, weight, bias)
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 1)
    found = linear_fp8(x, stored, scale, bias)
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert torch.equal(found[..., 512:], F.linear(x, weight[512:], bias[512:]))


def test_fp8_linear_is_within_four_percent_on_gaussians() -> None:
    x, weight = torch.randn(64, 1024), torch.randn(128, 1024)
    error = relative(linear_fp8(x, *quantise_rows(weight, "fp8", 1), None), x.double() @ weight.double().t())
    assert 0.01 < error < 0.04, error


FP8_DEVICE = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="needs a CUDA device of capability 8.9",
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=FP8_DEVICE)])
@pytest.mark.parametrize("m", [1, 17, 300])
def test_fp8_products_match_their_dequantised_tensors(m: int, device: str) -> None:
    x, bias = torch.randn(m, 512).bfloat16().to(device), torch.randn(256).bfloat16().to(device)
    stored, scale = quantise_rows(torch.randn(256, 512).to(device), "fp8", 1)
    tokens, token_scale = quantise_tokens(x, "fp8", 1)
    values = tokens.double() * token_scale[:, None].double()
    exact = F.linear(values, stored.double() * scale[:, None].double(), bias.double())
    made = make_tokens(x, "fp8", 1, "reference")
    run = fp8.scaled_mm if device == "cpu" else partial(linear_fp8, implementation="scaled_mm")
    assert relative(run(made, stored, scale, bias), exact) < 2 * relative(exact.bfloat16(), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_linear_has_the_same_bits_on_the_device(m: int, k: int, n: int) -> None:
    group = largest_group(k)
    x = torch.randn(m, k)
    stored, scale = quantise_rows(torch.randn(n, k), "int8", group)
    on_cpu = linear_int8(x, stored, scale, None, group)
    assert torch.equal(linear_int8(x.cuda(), stored.cuda(), scale.cuda(), None, group).cpu(), on_cpu)
