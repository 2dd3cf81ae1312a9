"""The two linear layers with their epilogues, in torch and in Triton; under the interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from qengine.errors import KernelError
from qengine.kernels.epilogue import Epilogue, apply
from qengine.kernels.linear_fp8 import linear_fp8
from qengine.kernels.linear_int8 import linear_int8
from qengine.kernels.quant import GROUPS, make_tokens, quantise_rows, quantise_tokens

from tests.kernels.counting import counted
from tests.kernels.rounding import rounded_as_on_a_card

pytest.importorskip("triton")
from qengine.kernels import tiles  # noqa: E402
from qengine.kernels.linear_fp8 import triton as fp8  # noqa: E402
from qengine.kernels.linear_int8 import triton as int8  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 423, 213), (1, 64, 5), (19, 192, 70), (40, 36, 65), (2, 213 * 16, 3)]
"""(tokens, columns, rows of the weight): every tile but the largest, one token, nothing a multiple of 16."""

FLOATS = [torch.float32, torch.bfloat16]
FP8 = ["triton", "triton-w8a16"]
LUCK = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_as_on_a_card(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float tensor that the ops allocate is NaN at first."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", empty)


def largest_group(columns: int) -> int:
    return max(group for group in GROUPS if columns % group == 0)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def made(m: int, k: int, n: int, dtype: torch.dtype, weight_format: str, spread: float = 1.0):
    """x [m, k] in every second row of its memory, stored weight, scale, bias and group."""
    group = largest_group(k) if weight_format == "int8" else 1
    x = torch.randn(2 * m, k, device=DEVICE).to(dtype)[::2]
    stored, scale = quantise_rows(torch.randn(n, k, device=DEVICE) * spread / k**0.5, weight_format, group)
    return x, stored, scale, torch.randn(n, device=DEVICE).to(dtype), group


def gated(shape, dtype: torch.dtype, split: int | None) -> Epilogue:
    """Random gates and residual for a result of this shape."""
    gate, rest = (torch.randn(shape[-1], device=DEVICE).to(dtype) for _ in range(2))
    residual = torch.randn(shape, device=DEVICE).to(dtype)
    return Epilogue(gate=gate, gate_rest=None if split is None else rest, split=split, residual=residual)


def exactly(y: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The epilogue by its formula in float64, for y [..., tokens, N]."""
    y = F.gelu(y, approximate="tanh") if epilogue.gelu else y
    if epilogue.gate is None or epilogue.residual is None:
        return y
    gate = epilogue.gate.double().expand(y.shape).clone()
    if epilogue.gate_rest is not None:
        gate[..., epilogue.split :, :] = epilogue.gate_rest.double()
    return epilogue.residual.double() + gate * y


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"), [(*shape, FLOATS[number % 2]) for number, shape in enumerate(SHAPES)]
)
def test_int8_products_in_triton_have_the_bits_of_the_definition(m, k, n, dtype, monkeypatch) -> None:
    kernel = counted(monkeypatch, int8, "_linear_int8")
    x, stored, scale, bias, group = made(m, k, n, dtype, "int8")
    for each in (bias, None):
        exact = linear_int8(x, stored, scale, each, group)
        assert torch.equal(linear_int8(x, stored, scale, each, group, implementation="triton"), exact)
    assert kernel.launches == 2
    assert torch.equal(linear_int8(x, stored, scale, bias, group, implementation="int_mm"),
                       linear_int8(x, stored, scale, bias, group))  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("split", "dtype"), [(None, FLOATS[0]), (0, FLOATS[0]), (4, FLOATS[0]), (4, FLOATS[1]), (9, FLOATS[1])]
)
def test_int8_gates_and_residuals_have_the_bits_of_the_definition_over_both_ranges(split, dtype, monkeypatch) -> None:
    kernel = counted(monkeypatch, int8, "_linear_int8")
    x, stored, scale, bias, group = made(14, 64, 40, dtype, "int8")
    x = x.view(2, 7, 64)
    epilogue = gated((2, 7, 40), dtype, split)
    kept = epilogue.residual.clone()
    found, defined = (
        linear_int8(x, stored, scale, bias, group, epilogue=epilogue, implementation=name)
        for name in ("triton", "reference")
    )
    assert kernel.launches == 1 and torch.equal(found, defined) and torch.equal(epilogue.residual, kept)
    linear = F.linear(dequantised(x, "int8", group), stored.double() * scale[:, None].double(), bias.double())
    exact = exactly(linear, epilogue)
    assert relative(defined, exact) <= 2 * relative(exact.to(dtype), exact) + LUCK


def dequantised(x: torch.Tensor, weight_format: str, group: int) -> torch.Tensor:
    """What the tokens stand for, float64, still rotated."""
    tokens, scale = quantise_tokens(x.reshape(-1, x.shape[-1]), weight_format, group)
    return (tokens.double() * scale[:, None].double()).view(x.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_gelu_is_as_near_as_that_of_torch(implementation, dtype) -> None:
    x, stored, scale, bias, group = made(16, 64, 60, dtype, "int8", spread=4)
    found = linear_int8(x, stored, scale, bias, group, epilogue=Epilogue(gelu=True), implementation=implementation)
    y = F.linear(dequantised(x, "int8", group), stored.double() * scale[:, None].double(), bias.double())
    assert y.min() < -6 and y.max() > 6
    exact = F.gelu(y, approximate="tanh")
    assert relative(found, exact) <= 2 * relative(F.gelu(y.to(dtype), approximate="tanh"), exact)


def test_all_of_the_epilogue_together_is_its_formula() -> None:
    x, stored, scale, bias, group = made(5, 64, 9, torch.float32, "int8")
    epilogue = replace(gated((5, 9), torch.float32, 2), gelu=True)
    y = F.linear(dequantised(x, "int8", group), stored.double() * scale[:, None].double(), bias.double())
    for name in ("reference", "triton"):
        found = linear_int8(x, stored, scale, bias, group, epilogue=epilogue, implementation=name)
        assert relative(found, exactly(y, epilogue)) < 1e-6
    assert relative(apply(y.float(), epilogue), exactly(y, epilogue)) < 1e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("implementation", FP8)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_fp8_products_in_triton_match_their_dequantised_tensors(implementation, m, k, n, monkeypatch) -> None:
    kernel = counted(monkeypatch, fp8, "_linear_fp8")
    x, stored, scale, bias, _ = made(m, k, n, torch.bfloat16, "fp8")
    values = x.double() if implementation == "triton-w8a16" else dequantised(x, "fp8", 1)
    for each, epilogue in ((bias, None), (None, Epilogue(gelu=True)), (bias, gated((m, n), torch.bfloat16, 2))):
        found = linear_fp8(x, stored, scale, each, implementation, epilogue=epilogue)
        y = values @ (stored.double() * scale[:, None].double()).t() + (0 if each is None else each.double())
        exact = exactly(y, epilogue or Epilogue())
        eager = exactly(y.bfloat16().double(), epilogue or Epilogue()).bfloat16()
        assert found.dtype == torch.bfloat16 and relative(found, exact) <= 2 * relative(eager, exact)
    assert kernel.launches == 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_epilogue_after_the_dequantising_layer_is_the_epilogue_of_torch(dtype) -> None:
    x, stored, scale, bias, _ = made(6, 36, 20, dtype, "fp8")
    y = linear_fp8(x, stored, scale, bias)
    epilogue = gated((6, 20), dtype, 4)
    exact = epilogue.residual.clone()
    exact[:4].addcmul_(y[:4], epilogue.gate)
    exact[4:].addcmul_(y[4:], epilogue.gate_rest)
    assert torch.equal(linear_fp8(x, stored, scale, bias, epilogue=epilogue), exact)
    found = linear_fp8(x, stored, scale, bias, epilogue=Epilogue(gelu=True))
    assert torch.equal(found, F.gelu(y, approximate="tanh"))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_residual_may_be_overwritten_and_a_result_may_land_inside_a_larger_one(implementation) -> None:
    x, stored, scale, bias, group = made(6, 64, 70, torch.float32, "int8")
    epilogue = gated((1, 6, 70), torch.float32, 4)
    more = {"epilogue": epilogue, "implementation": implementation}
    exact = linear_int8(x[None], stored, scale, bias, group, **more)
    joint = torch.full((1, 11, 70), float("nan"), device=DEVICE)
    place = joint[:, 5:]
    assert linear_int8(x[None], stored, scale, bias, group, out=place, **more) is place
    assert torch.equal(place, exact) and joint[:, :5].isnan().all()
    assert linear_int8(x[None], stored, scale, bias, group, out=epilogue.residual, **more) is epilogue.residual
    assert torch.equal(epilogue.residual, exact)


@pytest.mark.parametrize("implementation", FP8)
def test_fp8_results_land_where_they_are_wanted(implementation) -> None:
    x, stored, scale, bias, _ = made(6, 64, 5, torch.bfloat16, "fp8")
    exact = linear_fp8(x, stored, scale, bias, implementation)
    joint = torch.full((11, 5), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    linear_fp8(x, stored, scale, bias, implementation, out=joint[5:])
    assert torch.equal(joint[5:], exact) and joint[:5].isnan().all()


@pytest.mark.parametrize(
    ("weight_format", "implementation"), [("int8", "triton"), ("int8", "reference"), ("fp8", "triton")]
)
def test_tokens_quantised_once_give_the_bits_of_those_quantised_by_the_layer(weight_format, implementation) -> None:
    x, stored, scale, bias, group = made(3, 64, 5, torch.bfloat16, weight_format)
    kept = x.clone()
    shared = make_tokens(x[None], weight_format, group, "reference")
    run = linear_int8 if weight_format == "int8" else linear_fp8
    arguments = (stored, scale, bias) + ((group,) if weight_format == "int8" else ())
    exact = run(x[None], *arguments, implementation=implementation)
    assert exact.shape == (1, 3, 5) and torch.equal(run(shared, *arguments, implementation=implementation), exact)
    assert torch.equal(x, kept), "a side branch reads the input as it was"


@pytest.mark.parametrize("architecture", [86, 90])
def test_the_largest_tile_has_the_bits_of_the_others_as_one_piece_and_as_halves(architecture, monkeypatch) -> None:
    x, stored, scale, bias, group = made(3, 128, 130, torch.bfloat16, "int8")
    few = linear_int8(x, stored, scale, bias, group, implementation="triton")
    monkeypatch.setattr(tiles, "FULL", 1)
    monkeypatch.setattr(tiles, "architecture", lambda x: architecture)
    kernel = counted(monkeypatch, int8, "_linear_int8")
    assert int8.TILES["full"].halves(architecture) == (architecture == 86)
    assert torch.equal(linear_int8(x, stored, scale, bias, group, implementation="triton"), few)
    assert kernel.launches == 1


def test_a_tile_follows_from_the_shape_alone() -> None:
    table = int8.TILES
    names = {id(tile): name for name, tile in table.items()}
    shapes = [(1, 3072), (16, 12288), (17, 3072), (250, 3072), (250, 12288), (8192, 3072)]
    found = [names[id(tiles.pick(table, *shape))] for shape in shapes]
    assert found == ["few", "few", "small", "small", "full", "full"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("implementation", ["int8", *FP8])
def test_a_token_that_is_not_finite_spoils_its_own_row_alone(bad: float, implementation) -> None:
    weight_format = "int8" if implementation == "int8" else "fp8"
    x, stored, scale, bias, group = made(4, 64, 9, torch.bfloat16, weight_format)

    def run() -> torch.Tensor:
        if weight_format == "int8":
            return linear_int8(x, stored, scale, bias, group, implementation="triton")
        return linear_fp8(x, stored, scale, bias, implementation)

    clean = run()
    x[2, 7] = bad
    found = run()
    assert not found[2].isfinite().any() and torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


X, STORED, SCALE, BIAS, GROUP = made(3, 16, 4, torch.float32, "int8")
BYTES = quantise_rows(torch.randn(4, 16), "fp8", 1)
GATE = torch.randn(4)
RESIDUAL = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "fast"}, "implementation must be one of reference, int_mm, triton, got 'fast'"),
        ({"x": torch.randn(0, 16)}, r"x must be float32 or bfloat16 \[..., columns\], got torch.float32 \[0, 16\]"),
        ({"x": torch.randn(3, 15)}, "weight must have the 15 columns of x"),
        ({"x": torch.randn(3, 16).half()}, "x must be float32 or bfloat16"),
        ({"x": torch.randn(3, 16, device="meta")}, "weight must be on meta as x is, got cpu"),
        ({"weight": STORED.t().contiguous().t()}, "weight and scale must be contiguous"),
        ({"scale": SCALE.double()}, "scale must be float32"),
        ({"bias": BIAS[::2]}, "bias must be float32 or bfloat16"),
        ({"out": torch.empty(3, 5)}, r"out must be torch.float32 \[3, 4\] on cpu, got torch.float32 \[3, 5\]"),
        ({"out": torch.empty(3, 4).bfloat16()}, "out must be torch.float32"),
        ({"out": torch.empty(4, 3).t()}, r"out must be .* of strides \(1, 3\)"),
        ({"epilogue": Epilogue(gate=GATE)}, "residual must be given with gate, got None"),
        ({"epilogue": Epilogue(residual=RESIDUAL)}, "gate must be given with residual, got None"),
        ({"epilogue": Epilogue(gate=GATE, residual=RESIDUAL, split=1)}, "split must be given with gate_rest"),
        ({"epilogue": Epilogue(gate=GATE, residual=RESIDUAL, gate_rest=GATE, split=-1)}, "split must be at least 0"),
        ({"epilogue": Epilogue(gate=GATE[:3], residual=RESIDUAL)}, r"gate must be torch.float32 \[4\] on cpu"),
        ({"epilogue": Epilogue(gate=GATE, residual=RESIDUAL[:2])}, r"residual must be torch.float32 \[3, 4\]"),
        ({"x": make_tokens(X, "int8", 1, "reference")}, "tokens must be int8 in groups of 16, got int8 in groups of 1"),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_what_the_int8_layer_does_not_take_is_an_error_and_nothing_is_written(implementation, change, message) -> None:
    out = torch.full((3, 4), 7.0)
    given = {"x": X.cpu(), "weight": STORED.cpu(), "scale": SCALE.cpu(), "bias": BIAS.cpu(), "group": GROUP}
    given |= {"out": out, "implementation": implementation} | change
    with pytest.raises(KernelError, match=message):
        linear_int8(**given)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, *BYTES, BIAS, "triton-w8a16"), "x must be bfloat16 for triton-w8a16, got torch.float32"),
        ((make_tokens(X, "fp8", 1, "reference"), *BYTES, BIAS, "dequantise"), "x must be a tensor for dequantise"),
        ((X.bfloat16(), *BYTES, BIAS, "triton"), "bias must be torch.bfloat16"),
        ((X, STORED, SCALE, BIAS, "triton"), "weight must be a matrix of torch.float8_e4m3fn"),
    ],
)
def test_what_the_fp8_layer_does_not_take_is_an_error(arguments, message) -> None:
    with pytest.raises(KernelError, match=message):
        linear_fp8(*arguments)


def test_products_of_e4m3_are_refused_before_capability_8_9(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "architecture", lambda x: 86)
    with pytest.raises(KernelError, match="device must be of capability 8.9 or later for triton, got 8.6"):
        linear_fp8(X, *BYTES, None, "triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_cpu_tensor_is_refused_where_triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "InterpretedFunction", type(None))
    for run in (lambda: linear_int8(X, STORED, SCALE, BIAS, GROUP, implementation="triton"),
                lambda: linear_fp8(X.bfloat16(), *BYTES, None, "triton-w8a16")):  # fmt: skip
        with pytest.raises(KernelError, match="device must be CUDA for Triton, got cpu"):
            run()
