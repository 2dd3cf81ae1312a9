"""The Triton rows against their definition, byte for byte; under the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels.quant import GROUPS, quantise_rows, quantise_tokens, reference

from tests.kernels.counting import counted
from tests.kernels.rounding import rounded_as_on_a_card

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from qengine.kernels.quant import triton as ours  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS = ["int8", "fp8"]
ALL_BITS = torch.arange(-(1 << 15), 1 << 15).short().view(torch.bfloat16)
"""Every bfloat16 there is."""


@triton.jit
def _encode_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, ours.encode_e4m3(tl.load(x_ptr + at).to(tl.float32)))


@triton.jit
def _decode_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, ours.decode_e4m3(tl.load(x_ptr + at)))


@pytest.fixture(autouse=True)
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded_as_on_a_card(monkeypatch)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every float tensor that the op allocates is NaN at first, and every byte 0x81."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -127)

    monkeypatch.setattr(torch, "empty", empty)


def equal(found: tuple[torch.Tensor, torch.Tensor], exact: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Same bytes, same scales."""
    same = torch.equal(found[0].view(torch.uint8), exact[0].view(torch.uint8))
    return same and found[0].dtype == exact[0].dtype and torch.equal(found[1], exact[1])


def test_every_bfloat16_becomes_the_e4m3_that_torch_makes_of_it() -> None:
    found = torch.empty(1 << 16, dtype=torch.uint8, device=DEVICE)
    _encode_kernel[(16,)](ALL_BITS.to(DEVICE), found, SIZE=4096)
    exact = ALL_BITS.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    nan = ALL_BITS.isnan()
    assert (found.cpu()[nan] & 0x7F == 0x7F).all() and torch.equal(found.cpu()[~nan], exact.view(torch.uint8)[~nan])


def test_float32_between_two_e4m3_rounds_as_torch_rounds_it() -> None:
    steps = torch.arange(0, 127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (steps[1:] + steps[:-1]) / 2
    x = torch.cat([torch.nextafter(middles, steps[1:]), middles, torch.nextafter(middles, steps[:-1])])
    x = torch.cat([x, -x, torch.tensor([448.0, 2.0**-10, 2.0**-11, 1e-40, 0.0, -0.0])])
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    found = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    _encode_kernel[(1,)](x.to(DEVICE), found, SIZE=1024)
    assert torch.equal(found.cpu(), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_every_byte_of_e4m3_is_decoded_as_torch_decodes_it() -> None:
    every = torch.arange(256).to(torch.uint8)
    found = torch.empty(256, device=DEVICE)
    _decode_kernel[(1,)](every.to(DEVICE), found, SIZE=256)
    exact = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(found.cpu().nan_to_num(999), exact.nan_to_num(999))
    assert torch.equal(found.cpu().signbit()[~exact.isnan()], exact.signbit()[~exact.isnan()])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_have_the_bits_of_the_definition(weight_format: str, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = counted(monkeypatch, ours, "_quantise")
    shapes = [(3, 423, 1), (1, 36, 4), (5, 1, 1), (2, 213 * 16, 16), (2, 192, 64), (3, 768, 256)]
    for launches, (rows, columns, group) in enumerate(shapes):
        x = torch.randn(rows, columns).to(dtype).to(DEVICE)
        x[0, 0] *= 60
        exact = reference.quantise(x, ours_dtype(weight_format), group, torch.float32)
        found = quantise_tokens(x, weight_format, group, implementation="triton")
        assert kernel.launches == launches + 1 and equal(found, exact), (rows, columns, group)


def ours_dtype(weight_format: str) -> torch.dtype:
    return torch.int8 if weight_format == "int8" else torch.float8_e4m3fn


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_too_long_for_the_registers_has_them_too(weight_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = counted(monkeypatch, ours, "_quantise_long")
    for columns, group in ((18944, 256), (16385, 1)):
        x = torch.randn(2, columns, device=DEVICE).bfloat16()
        exact = quantise_rows(x, weight_format, group)
        assert equal(quantise_rows(x, weight_format, group, implementation="triton"), exact)
    assert kernel.launches == 2


@pytest.mark.parametrize("weight_format", FORMATS)
def test_scales_of_bfloat16_are_rounded_before_they_divide(weight_format: str) -> None:
    weight = torch.randn(16, 64, device=DEVICE)
    weight[3] = 0
    found, exact = (
        quantise_rows(weight, weight_format, 16, scale_dtype=torch.bfloat16, implementation=name)
        for name in ("triton", "reference")
    )
    assert found[1].dtype == torch.bfloat16 and equal(found, exact)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_may_lie_any_distance_apart_and_are_left_as_they_are(weight_format: str) -> None:
    whole = torch.randn(6, 200, device=DEVICE)
    kept = whole.clone()
    for x in (whole[::2, 8:136], whole[:, :64].t()[:, :4], whole[:1, 1:65].expand(3, 64)):
        found = quantise_tokens(x, weight_format, 4, implementation="triton")
        assert equal(found, quantise_tokens(x.contiguous(), weight_format, 4))
    assert torch.equal(whole, kept)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_rows_of_zeros_and_of_tiny_numbers_keep_their_bits(weight_format: str) -> None:
    x = torch.zeros(4, 16, device=DEVICE)
    x[1], x[2, 3], x[3] = 1e-45, 1e-38, 3e38 / 4
    found = quantise_tokens(x, weight_format, 4, implementation="triton")
    assert equal(found, quantise_tokens(x, weight_format, 4))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("weight_format", "group"), [("int8", 1), ("int8", 64), ("fp8", 1)])
def test_a_token_that_is_not_finite_has_a_scale_that_is_not(bad: float, weight_format: str, group: int) -> None:
    x = torch.randn(3, 64, device=DEVICE)
    clean = quantise_tokens(x, weight_format, group)
    x[1, 5] = bad
    stored, scale = quantise_tokens(x, weight_format, group, implementation="triton")
    assert not scale[1].isfinite()
    assert equal((stored[[0, 2]], scale[[0, 2]]), (clean[0][[0, 2]], clean[1][[0, 2]]))
    with pytest.raises(KernelError, match="weight must be finite, got"):
        quantise_rows(x, weight_format, group, implementation="triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 4), "int8", 1, "fast"), "implementation must be one of reference, triton, native, got 'fast'"),
        ((torch.randn(0, 4), "int8", 1, "triton"), "x must be a matrix"),
        ((torch.randn(4), "fp8", 1, "triton"), "x must be a matrix"),
        ((torch.ones(2, 4, dtype=torch.int32), "int8", 1, "triton"), "x must be one of float32"),
        ((torch.randn(2, 6), "int8", 4, "triton"), "positive multiple of the group 4"),
    ],
)
def test_what_the_rows_do_not_take_is_an_error(arguments, message: str) -> None:
    *rest, implementation = arguments
    with pytest.raises(KernelError, match=message):
        quantise_tokens(*rest, implementation=implementation)


def test_a_cpu_tensor_is_refused_where_triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qengine.kernels.tiles.InterpretedFunction", type(None))
    with pytest.raises(KernelError, match="device must be CUDA for Triton, got cpu"):
        quantise_tokens(torch.randn(2, 4), "int8", 4, implementation="triton")


def test_every_group_of_the_rotation_is_the_definition_to_the_bit() -> None:
    x = torch.randn(2, 512, device=DEVICE)
    for group in GROUPS:
        assert equal(quantise_tokens(x, "int8", group, implementation="triton"), quantise_tokens(x, "int8", group))
