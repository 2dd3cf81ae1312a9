"""Native rows against the definition: the same bits on every instruction set, from every float there is."""

from __future__ import annotations

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels import native
from qengine.kernels.quant import GROUPS, reference
from qengine.kernels.quant import native as rows

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORED = (torch.int8, torch.float8_e4m3fn)
SHAPES = ((1, 1), (3, 423), (7, 36), (5, 192), (2, 768), (3, 1280), (9, 16), (1, 3072))
"""Columns that fill no vector, a part of a chunk, whole chunks, and chunks with a part left over."""


@pytest.fixture(params=native.ISAS[1:])
def isa(request: pytest.FixtureRequest) -> str:
    if not native.isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Bit for bit, where the scale is finite; else a scale that is not finite either."""
    (stored, scale), (rows_wanted, scale_wanted) = found, wanted
    finite = scale_wanted.isfinite()
    return (
        torch.equal(scale.isfinite(), finite)
        and torch.equal(scale[finite], scale_wanted[finite])
        and torch.equal(stored[finite].view(torch.uint8), rows_wanted[finite].view(torch.uint8))
    )


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit float."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def headed(values: torch.Tensor, tops: list[float]) -> torch.Tensor:
    """Rows of the values that are no larger than the row's top, which stands first; zeros take the others' places."""
    table = [torch.where(values.float().abs() <= top, values, torch.zeros_like(values)) for top in tops]
    return torch.stack(
        [torch.cat([torch.tensor([top]).to(values.dtype), row]) for top, row in zip(tops, table, strict=True)]
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_rows_have_the_bits_of_the_reference(isa: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    for shape in SHAPES:
        x = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
        kept = x.clone()
        for group in (g for g in GROUPS if shape[1] % g == 0):
            for scale in (torch.float32, torch.bfloat16):
                found = rows.quantise(x, stored, group, scale, 2, isa=isa)
                assert found[0].dtype == stored and found[1].dtype == scale and found[0].shape == x.shape
                assert same(found, reference.quantise(x, stored, group, scale)), (shape, group, scale)
        assert torch.equal(x, kept)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_all_65536_bfloat16_values_are_stored_as_the_reference_stores_them(isa: str, stored: torch.dtype) -> None:
    values = every_value(torch.bfloat16)
    limit, largest = reference.LIMITS[stored], torch.finfo(torch.bfloat16).max
    x = headed(values, [limit, limit * 2**-20, limit * 2.0**-130, limit * 2.0**119, 3.0, largest])
    found = rows.quantise(x, stored, 1, torch.float32, isa=isa)
    assert found[1][:2].tolist() == [1.0, 2**-20]
    assert same(found, reference.quantise(x, stored, 1, torch.float32))
    strange = values[~values.isfinite()].reshape(-1, 1)
    assert len(values) == 65536 and len(strange) == 256
    assert not rows.quantise(strange, stored, 1, torch.float32, isa=isa)[1].isfinite().any()


def test_e4m3_of_scale_1_is_the_cast_of_torch(isa: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = headed(every_value(dtype), [448.0])
        stored, scale = rows.quantise(x, torch.float8_e4m3fn, 1, torch.float32, isa=isa)
        assert scale.tolist() == [1.0]
        assert torch.equal(stored.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_all_float16_values_and_random_float32_are_stored_as_the_reference_stores_them(
    isa: str, stored: torch.dtype
) -> None:
    limit = reference.LIMITS[stored]
    halves = headed(every_value(torch.float16), [limit, limit / 64, 2.0**-14, 2.0**-23, 65504.0])
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 15,)).to(torch.int32).view(torch.float32)
    x = headed(torch.where(bits.isfinite(), bits, 0.0), [3e38, 1e30, limit, 1e-3, 1e-37, 1e-40, 1e-44])
    for values in (halves, x):
        for scale in (torch.float32, torch.bfloat16):
            found = rows.quantise(values, stored, 1, scale, isa=isa)
            assert same(found, reference.quantise(values, stored, 1, scale))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_rows_of_zeros_denormals_nan_and_infinity_do_not_touch_the_others(isa: str, stored: torch.dtype) -> None:
    x = torch.randn(6, 256)
    x[1], x[2, 3], x[3, 255], x[4] = 0, float("nan"), -float("inf"), x[4] * 1e-43
    for group in (1, 256):
        found = rows.quantise(x, stored, group, torch.float32, isa=isa)
        assert same(found, reference.quantise(x, stored, group, torch.float32))
        assert found[1].isfinite().tolist() == [True, True, False, False, True, True]
        assert found[1][1] == 1 and not found[0][1].float().any()


def test_the_number_of_threads_changes_no_bit_and_large_outputs_are_the_same(isa: str) -> None:
    x = torch.randn(300, 16384).bfloat16()
    wanted = reference.quantise(x, torch.int8, 256, torch.float32)
    for threads in (1, 2, 7, 64, None):
        assert same(rows.quantise(x, torch.int8, 256, torch.float32, threads, isa=isa), wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_may_lie_anywhere(dtype: torch.dtype) -> None:
    wide = torch.randn(12, 700).to(dtype)
    views = {
        "part of the columns": wide[:, 37:549],
        "every third row": wide[::3, :512],
        "one row, repeated": wide[:1, :512].expand(5, 512),
        "columns": wide[:, :64].t()[:, :12],
        "one column": wide[:, 3:4],
        "one row": wide[5:6, 1:257],
    }
    for name, x in views.items():
        group = max(g for g in GROUPS if x.shape[1] % g == 0)
        for stored in STORED:
            found = rows.quantise(x, stored, group, torch.float32)
            assert same(found, reference.quantise(x.contiguous(), stored, group, torch.float32)), name


def test_nothing_is_written_beside_the_output(isa: str) -> None:
    for columns in (1, 31, 64, 423, 1280):
        x = torch.randn(5, columns)
        for shift in (0, 1, 16):
            room, scales = torch.full((5 * columns + 64,), 77, dtype=torch.int8), torch.full((9,), -1.0)
            out = room[shift : shift + 5 * columns].view(5, columns), scales[2:7]
            assert rows.quantise(x, torch.int8, 1, torch.float32, out=out, isa=isa)[0] is out[0]
            assert same(out, reference.quantise(x, torch.int8, 1, torch.float32))
            assert (room[:shift] == 77).all() and (room[shift + 5 * columns :] == 77).all()
            assert scales[:2].tolist() == [-1, -1] and scales[7:].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 8, dtype=torch.int32)}, "x must be float32, bfloat16, float16, got int32"),
        ({"x": torch.ones(8)}, r"x must be a matrix .* got shape \[8\]"),
        ({"x": torch.ones(0, 8)}, r"not empty, got shape \[0, 8\]"),
        ({"x": torch.ones(2, 8, device="meta")}, "x must be on the CPU, got meta"),
        ({"stored_dtype": torch.uint8}, "stored must be int8 or float8_e4m3fn"),
        ({"scale_dtype": torch.float16}, "with float32 or bfloat16 scales"),
        ({"group": 16}, "divide the 8 columns, got 16"),
        ({"group": 2}, "group must be 1, 4, 16, 64 or 256"),
        ({"threads": 0}, "threads must be 1 to 64, got 0"),
        ({"threads": 65}, "threads must be 1 to 64, got 65"),
        ({"isa": "sse9"}, "isa must be one of"),
        ({"out": (torch.full((2, 9), 5, dtype=torch.int8)[:, :8], torch.ones(2))}, "not contiguous"),
        ({"out": (torch.full((8, 2), 5, dtype=torch.int8), torch.ones(2))}, r"stored must be .* \[2, 8\]"),
        ({"out": (torch.full((2, 8), 5, dtype=torch.int8), torch.ones(3))}, r"scale must be .* \[2\]"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(changed: dict, message: str) -> None:
    out = torch.full((2, 8), 5, dtype=torch.int8), torch.full((2,), -1.0)
    arguments = {
        "x": torch.ones(2, 8),
        "stored_dtype": torch.int8,
        "group": 1,
        "scale_dtype": torch.float32,
        "threads": 1,
        "isa": "best",
        "out": out,
    } | changed
    with pytest.raises(KernelError, match=message):
        rows.quantise(**arguments)
    assert (arguments["out"][0] == 5).all() and (out[1] == -1).all()


def test_a_cpu_without_an_instruction_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda name: "")
    with pytest.raises(KernelError, match="isa must be one that this CPU has, got 'avx512'"):
        rows.quantise(torch.ones(1, 1), torch.int8, 1, torch.float32, isa="avx512")


def test_without_a_library_the_error_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "status", lambda: native.NativeStatus(None, None, "it was left out"))
    with pytest.raises(KernelError, match="must be loaded, got: it was left out"):
        rows.quantise(torch.ones(1, 1), torch.int8, 1, torch.float32)
