"""Native column statistics, normalisation and outlier masks against float64, beside the float32 definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels import native, normalise
from qengine.kernels.normalise import native as columns
from qengine.kernels.normalise import reference

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no native library: {native.reason()}")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((2, 1), (3, 423), (213, 36), (240, 130), (20, 1500))
THRESHOLD, TARGET, CLIP, WEIGHT = 3.0, 70.0, 2.0, 0.3


@pytest.fixture(params=native.ISAS[1:])
def isa(request: pytest.FixtureRequest) -> str:
    if not native.isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with columns of many spreads and means and one large row, as an attention sink is, and reference statistics."""
    x = torch.randn(shape) * torch.randn(shape[1]).exp() + 3 * torch.randn(shape[1])
    x[0] *= 20
    return x.to(dtype), torch.randn(shape[1]), torch.rand(shape[1]) + 0.05


def exact(x: torch.Tensor, mean, std, outlier_mode: str, direction: str, mode: str):
    """The formulas in float64: x after the mask, x after both steps, the ratios."""
    x, mean, std = x.double(), mean.double(), std.double()
    own = x.std(0)
    high, low = own / std.clamp_min(1e-6), std / own.clamp_min(1e-6)
    ratio = {"high": high, "low": low, "both": torch.maximum(high, low)}[direction]
    rises = {"high": False, "low": True}.get(direction, low > high)
    factor = torch.where(torch.as_tensor(rises), low / THRESHOLD, THRESHOLD / high)
    factor = {"none": torch.ones_like(own), "zero": torch.zeros_like(own)}.get(outlier_mode, factor)
    masked = x * torch.where(ratio > THRESHOLD, factor, 1.0)
    z = (masked - masked.mean(0)) / masked.std(0).clamp_min(1e-6)
    per_dim = z.clamp(-CLIP, CLIP) * std.clamp_min(1e-6) + mean
    whole = masked * (TARGET / masked.std())
    share = {"global": 0.0, "per_dim": 1.0, "hybrid": WEIGHT}[mode]
    return masked, share * per_dim + (1 - share) * whole, ratio


def no_worse(found: torch.Tensor, eager: torch.Tensor, wanted: torch.Tensor) -> bool:
    """At most twice the largest error of the float32 definition, or a rounding of the largest value."""
    unit = torch.finfo(found.dtype).eps * float(wanted.abs().max())
    worst = float((eager.double() - wanted).abs().max())
    return float((found.double() - wanted).abs().max()) <= max(2 * worst, unit / 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_as_near_to_float64_as_the_definition(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, _, _ = matrix(shape, dtype)
    found, eager = columns.column_stats(x, isa=isa), reference.column_stats(x)
    for ours, theirs, wanted in zip(found, eager, (x.double().mean(0), x.double().std(0)), strict=True):
        assert ours.dtype == torch.float32 and no_worse(ours, theirs, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", normalise.MODES)
def test_masked_and_normalised_is_as_near_to_float64_as_the_definition(isa: str, mode: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[1:]:
        x, mean, std = matrix(shape, dtype)
        for outlier_mode, direction in itertools.product(normalise.OUTLIER_MODES, normalise.DIRECTIONS):
            options = (THRESHOLD, outlier_mode, direction, mode, TARGET, CLIP, WEIGHT)
            found, ratios = columns.mask_and_normalise(x, mean, std, *options, isa=isa)
            eager, _ = reference.mask_and_normalise(x, mean, std, *options)
            _, wanted, ratio = exact(x, mean, std, outlier_mode, direction, mode)
            assert found.dtype == torch.float32 and found.shape == x.shape
            assert no_worse(found, eager, wanted), (shape, outlier_mode, direction)
            assert torch.allclose(ratios.double(), ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mask_changes_outliers_only_and_keeps_the_dtype(isa: str, dtype: torch.dtype) -> None:
    x, mean, std = matrix((213, 423), dtype)
    kept = x.clone()
    for mode, direction in itertools.product(normalise.OUTLIER_MODES, normalise.DIRECTIONS):
        found, ratios = columns.mask_outliers(x, std, THRESHOLD, mode, direction, isa=isa)
        eager, _ = reference.mask_outliers(x, std, THRESHOLD, mode, direction)
        wanted, _, _ = exact(x, mean, std, mode, direction, "global")
        stays = (ratios <= THRESHOLD) | (mode == "none")
        assert 0 < int((ratios > THRESHOLD).sum()) < len(ratios)
        assert found.dtype == dtype and torch.equal(found[:, stays], x[:, stays])
        assert no_worse(found, eager, wanted), (mode, direction)
        assert mode != "zero" or not found[:, ~stays].any()
        assert torch.equal(ratios, columns.outlier_ratios(x, std, direction, isa=isa))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("mode", normalise.MODES)
def test_normalise_alone_agrees_with_the_definition(mode: str) -> None:
    x, mean, std = matrix((57, 300), torch.float32)
    for clip in (None, 1.5):
        found = columns.normalise(x, mode, mean, std, TARGET, clip, WEIGHT)
        assert torch.allclose(
            found, reference.normalise(x, mode, mean, std, TARGET, clip, WEIGHT), rtol=1e-5, atol=1e-4
        )


def test_constant_columns_and_constant_matrices_have_no_deviation_at_all() -> None:
    x = torch.randn(50, 6)
    x[:, 2] = 0.1
    mean, std = columns.column_stats(x)
    assert std[2] == 0 and mean[2] == x[0, 2] and (std[[0, 1, 3, 4, 5]] > 0).all()
    level = torch.full((7, 33), 0.1)
    assert torch.equal(columns.normalise(level, "global", None, None, TARGET, CLIP, WEIGHT), level)
    moved = columns.normalise(level, "per_dim", torch.arange(33.0), torch.ones(33), TARGET, CLIP, WEIGHT)
    assert torch.equal(moved, torch.arange(33.0).expand(7, 33))


def test_one_row_can_be_normalised_as_a_whole() -> None:
    x = torch.randn(1, 500)
    found = columns.normalise(x, "global", None, None, TARGET, CLIP, WEIGHT)
    assert torch.allclose(found, x * (TARGET / x.std()), rtol=1e-5)


def test_the_number_of_threads_and_the_instruction_set_change_no_bit() -> None:
    x, mean, std = matrix((300, 1000), torch.bfloat16)
    options = (THRESHOLD, "scale", "both", "hybrid", TARGET, CLIP, WEIGHT)
    wanted = columns.mask_and_normalise(x, mean, std, *options, 1, isa="plain")
    for threads, isa in itertools.product((1, 2, 7, 64), filter(native.isa, native.ISAS)):
        found = columns.mask_and_normalise(x, mean, std, *options, threads, isa=isa)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_rows_may_lie_anywhere() -> None:
    wide, mean, std = torch.randn(40, 90), torch.randn(30), torch.rand(30) + 0.1
    for x in (wide[:, 7:37], wide[::3, :30], wide.t()[:30, :30], wide[:1, :30].expand(4, 30)):
        found = columns.normalise(x, "per_dim", mean, std, TARGET, CLIP, WEIGHT)
        copy = columns.normalise(x.contiguous(), "per_dim", mean, std, TARGET, CLIP, WEIGHT)
        assert torch.equal(found, copy)


def test_the_public_functions_run_it() -> None:
    x, mean, std = matrix((40, 64), torch.bfloat16)
    found, ratios = normalise.mask_and_normalise(x, mean, std, outlier_mode="clamp", implementation="native")
    wanted, _ = columns.mask_and_normalise(x, mean, std, 10.0, "clamp", "high", "per_dim", 70.0, 3.0, 0.5)
    assert torch.equal(found, wanted) and torch.equal(ratios, normalise.outlier_ratios(x, std, implementation="native"))


@pytest.mark.parametrize(
    ("x", "std", "threads", "message"),
    [
        (torch.ones(4, 3, dtype=torch.float64), torch.ones(3), 1, "x must be float32, bfloat16, float16, got float64"),
        (torch.ones(4), torch.ones(3), 1, r"got shape \[4\]"),
        (torch.ones(4, 0), torch.ones(0), 1, r"got shape \[4, 0\]"),
        (torch.ones(4, 3, device="meta"), torch.ones(3), 1, "x must be on the CPU, got meta"),
        (torch.ones(4, 3), torch.ones(4), 1, r"std must be \[3\] on the CPU, got \[4\]"),
        (torch.ones(4, 3), torch.ones(3), 65, "threads must be 1 to 64, got 65"),
    ],
)
def test_bad_arguments_are_refused(x: torch.Tensor, std: torch.Tensor, threads: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        columns.outlier_ratios(x, std, "high", threads)
    with pytest.raises(KernelError, match="must be the reference's for per_dim, got None"):
        columns.normalise(torch.ones(4, 3), "per_dim", None, None, TARGET, CLIP, WEIGHT)
