"""Column statistics, the outlier mask and the normalisation: the definition, and Triton against it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels import normalise as ops
from qengine.kernels.normalise import (
    DIRECTIONS,
    MODES,
    OUTLIER_MODES,
    column_stats,
    mask_and_normalise,
    mask_outliers,
    normalise,
    outlier_ratios,
    reference,
)

from tests.kernels.counting import counted

pytest.importorskip("triton")
from qengine.kernels.normalise import triton as fused  # noqa: E402

IMPLEMENTATIONS = ["reference", "triton"]
SHAPES = [(3, 423), (70, 41), (1100, 3)]
"""Columns in several blocks, rows in two tiles, tiles in two rounds."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = 1e-6
STEP = 2.0**-23
"""Of float32. No rival for the statistics alone: on a CPU torch takes them in float64."""


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the ops allocate is NaN at first."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)


def embeddings(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows like those of a text encoder: columns of unlike mean and spread, and a first row that dwarfs the others."""
    x = torch.randn(rows, columns) * (torch.rand(columns) * 6 + 1) + torch.randn(columns) * 4
    x[0, :: max(1, columns // 3)] += 500
    return x.to(dtype)


def references(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(columns) * 3, torch.rand(columns) * 5 + 0.2


def planted(ratios: dict[int, float], columns: int = 423, rows: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix whose columns have the spread of the reference, but for some that have it so many times."""
    _, std = references(columns)
    x = torch.randn(rows, columns, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0) * std + 2
    for column, ratio in ratios.items():
        x[:, column] *= ratio
    return x.float(), std


def exact_mask(x: np.ndarray, std: np.ndarray, threshold: float, mode: str, direction: str) -> np.ndarray:
    own = x.std(axis=0, ddof=1)
    high, low = own / np.maximum(std, FLOOR), std / np.maximum(own, FLOOR)
    masked = x.copy()
    for d in range(x.shape[1]):
        if direction != "low" and high[d] > threshold and high[d] >= low[d]:
            factor = threshold * (std[d] if mode == "clamp" else max(std[d], FLOOR)) / own[d]
        elif direction != "high" and low[d] > threshold:
            factor = low[d] / threshold if own[d] > 0 else 1.0
        else:
            continue
        masked[:, d] = {"none": x[:, d], "zero": 0.0}.get(mode, factor * x[:, d])
    return masked


def exact(
    x: np.ndarray, mode: str, mean: np.ndarray, std: np.ndarray, target: float, clip: float | None, weight: float
) -> np.ndarray:
    scaled = x * (target / x.std(ddof=1))
    if mode == "global":
        return scaled
    z = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0, ddof=1), FLOOR)
    z = z if clip is None else np.clip(z, -clip, clip)
    moved = z * np.maximum(std, FLOOR) + mean
    return moved if mode == "per_dim" else weight * moved + (1 - weight) * scaled


def eager(x: torch.Tensor, mode: str, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """What a torch program in float32 does, with ``target_std`` 70, ``clip_sigma`` 3 and ``weight`` 0.3."""
    scaled = x * (70.0 / x.std())
    if mode == "global":
        return scaled
    moved = ((x - x.mean(dim=0)) / x.std(dim=0).clamp_min(FLOOR)).clamp(-3, 3) * std.clamp_min(FLOOR) + mean
    return moved if mode == "per_dim" else 0.3 * moved + 0.7 * scaled


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype, implementation: str) -> None:
    x = embeddings(*shape, dtype)
    mean, std = column_stats(x, implementation=implementation)
    wide = x.double().numpy()
    assert mean.dtype == std.dtype == torch.float32
    assert error(mean, wide.mean(axis=0)) <= 2 * STEP
    assert error(std, wide.std(axis=0, ddof=1)) <= 2 * STEP


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_modes_are_the_formulas_of_float64_within_twice_the_eager_error(
    shape: tuple[int, int], mode: str, implementation: str
) -> None:
    dtype = {3: torch.float32, 70: torch.bfloat16}[shape[0]]
    x, (mean, std) = embeddings(*shape, dtype), references(shape[1])
    wanted = exact(x.double().numpy(), mode, mean.double().numpy(), std.double().numpy(), 70.0, 3.0, 0.3)
    found = normalise(x, mode, mean=mean, std=std, weight=0.3, implementation=implementation)
    assert found.dtype == torch.float32 and found.shape == x.shape and found.is_contiguous()
    assert error(found, wanted) <= 2 * error(eager(x.float(), mode, mean, std), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masks_and_modes_together_are_the_formulas_of_float64(implementation: str) -> None:
    x, std = planted({3: 617.9, 7: 42.0, 11: 1 / 617.9, 39: 1 / 42}, columns=41, rows=70)
    mean, _ = references(41)
    x[:, 20], std[25], x[:, 25] = 7.3, 0.0, x[:, 25] * 1e-3
    combinations = list(itertools.product(OUTLIER_MODES, DIRECTIONS, MODES))
    if implementation == "triton":
        # The interpreter takes half a second for each: every mask, every direction and every mode comes up.
        combinations = [combinations[i] for i in (1, 6, 14, 18, 25, 29, 35)]
    for outlier_mode, direction, mode in combinations:
        found, ratios = mask_and_normalise(
            *(x, mean, std), outlier_mode=outlier_mode, direction=direction, mode=mode, implementation=implementation
        )
        wide, vectors = x.double().numpy(), (mean.double().numpy(), std.double().numpy())
        wanted = exact(exact_mask(wide, vectors[1], 10.0, outlier_mode, direction), mode, *vectors, 70.0, 3.0, 0.5)
        assert error(found, wanted) < 1e-6, (outlier_mode, direction, mode)
        assert torch.equal(ratios, outlier_ratios(x, std, direction=direction, implementation=implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_global_gives_the_target_spread_and_keeps_every_direction(implementation: str) -> None:
    x = embeddings(5, 37)
    found = normalise(x, target_std=58, implementation=implementation)
    assert float(found.std()) == pytest.approx(58, rel=1e-5)
    assert torch.allclose(found, x * (58 / x.std()), rtol=1e-6)
    assert float(found.mean()) == pytest.approx(float(x.mean() * 58 / x.std()), rel=1e-5)
    assert float(normalise(x[:1], implementation=implementation).std()) == pytest.approx(70, rel=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_constant_stays_in_global_and_becomes_the_reference_mean_by_column(implementation: str) -> None:
    x = torch.full((70, 34), 0.1)
    mean, std = references(34)
    assert torch.equal(normalise(x, implementation=implementation), x)
    assert torch.equal(normalise(x[:1], implementation=implementation), x[:1])
    assert torch.equal(column_stats(x, implementation=implementation)[1], torch.zeros(34))
    assert torch.equal(normalise(x, "per_dim", mean=mean, std=std, implementation=implementation), mean.expand(70, 34))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_per_dim_gives_each_column_the_reference_and_clamps_at_three_deviations(implementation: str) -> None:
    x, (mean, std) = embeddings(40, 35), references(35)
    free = normalise(x, "per_dim", mean=mean, std=std, clip_sigma=None, implementation=implementation)
    assert torch.allclose(free.mean(dim=0), mean, atol=1e-5) and torch.allclose(free.std(dim=0), std, rtol=1e-5)
    clamped = normalise(x, "per_dim", mean=mean, std=std, implementation=implementation)
    far, near = ((free - mean).abs() > 3.001 * std), ((free - mean).abs() < 2.999 * std)
    assert far.any() and torch.equal(clamped[near], free[near])
    assert torch.equal(clamped[far], (torch.sign(free - mean) * 3 * std + mean)[far])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_per_dim_does_not_see_the_scale_of_a_column(implementation: str) -> None:
    x, (mean, std) = embeddings(9, 35), references(35)
    plain = normalise(x, "per_dim", mean=mean, std=std, implementation=implementation)
    scaled = normalise(x * 2.0 ** torch.arange(-17, 18), "per_dim", mean=mean, std=std, implementation=implementation)
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hybrid_is_exactly_the_weighted_sum_of_its_parts(implementation: str) -> None:
    x, (mean, std) = embeddings(6, 41), references(41)
    options = {"mean": mean, "std": std, "target_std": 61.0, "implementation": implementation}
    parts = normalise(x, "per_dim", **options), normalise(x, "global", **options)
    assert torch.equal(normalise(x, "hybrid", **options), 0.5 * parts[0] + 0.5 * parts[1])
    assert torch.equal(normalise(x, "hybrid", weight=1.0, **options), parts[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_planted_columns_are_found_in_order_and_inverse_ones_only_when_low_is_asked(implementation: str) -> None:
    x, std = planted({396: 617.9, 4: 42.0, 100: 1 / 617.9}, rows=5)
    found = {}
    for direction in DIRECTIONS:
        ratios = outlier_ratios(x, std, direction=direction, implementation=implementation)
        order = ratios.argsort(descending=True).tolist()
        found[direction] = {d: pytest.approx(float(ratios[d]), rel=1e-3) for d in order if ratios[d] > 10}
        assert list(found[direction]) == [d for d in order if ratios[d] > 10]
    assert found["high"] == {396: 617.9, 4: 42.0} and list(found["high"]) == [396, 4]
    assert found["low"] == {100: 617.9}
    assert found["both"] == {396: 617.9, 100: 617.9, 4: 42.0} and list(found["both"])[-1] == 4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_ratio_of_exactly_the_threshold_is_no_outlier(implementation: str) -> None:
    unit = torch.tensor([1.0, -1.0] * 4 + [0.0])[:, None]
    x, std = torch.cat((10 * unit, 10.0001 * unit, unit / 10), dim=1), torch.ones(3)
    masked, ratios = mask_outliers(x, std, mode="zero", implementation=implementation)
    assert ratios[0] == 10 and ratios[1] > 10
    assert torch.equal(masked[:, 0], x[:, 0]) and not masked[:, 1].any() and torch.equal(masked[:, 2], x[:, 2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", OUTLIER_MODES)
def test_a_mask_changes_outlier_columns_alone(mode: str, implementation: str) -> None:
    x, std = planted({3: 617.9, 30: 42.0, 5: 1 / 42}, columns=34, rows=20)
    before = x.clone()
    masked, ratios = mask_outliers(x, std, mode=mode, direction="both", implementation=implementation)
    assert torch.equal(x, before) and masked.data_ptr() != x.data_ptr()
    outlier = ratios > 10
    assert outlier.nonzero().flatten().tolist() == [3, 5, 30]
    assert torch.equal(masked[:, ~outlier].view(torch.int32), x[:, ~outlier].view(torch.int32))
    if mode == "none":
        assert torch.equal(masked, x)
    elif mode == "zero":
        assert torch.equal(masked[:, outlier].view(torch.int32), torch.zeros(20, 3, dtype=torch.int32))
    else:
        aim = std[outlier] * torch.tensor([10, 0.1, 10])
        assert torch.allclose(masked[:, outlier].std(dim=0), aim, rtol=1e-5)
        assert torch.allclose(
            masked[:, outlier].mean(dim=0), x[:, outlier].mean(dim=0) * aim / x[:, outlier].std(dim=0)
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clamp_and_scale_are_the_same_and_change_nothing_for_per_dim(implementation: str) -> None:
    x, std = planted({3: 617.9}, columns=34, rows=8)
    mean, _ = references(34)
    clamped, scaled = (
        mask_outliers(x, std, mode=mode, implementation=implementation)[0] for mode in ("clamp", "scale")
    )
    assert torch.equal(clamped, scaled) and not torch.equal(clamped, x)
    plain, masked = (
        mask_and_normalise(x, mean, std, outlier_mode=mode, implementation=implementation)[0]
        for mode in ("none", "clamp")
    )
    assert float(((plain - masked) / std).abs().max()) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_then_per_dim_is_the_reference_mean(implementation: str) -> None:
    x, std = planted({3: 617.9}, columns=34, rows=8)
    mean, _ = references(34)
    found, _ = mask_and_normalise(x, mean, std, outlier_mode="zero", implementation=implementation)
    assert torch.equal(found[:, 3], mean[3].expand(8)) and float(found.std(dim=0)[:3].min()) > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_constant_column_cannot_be_scaled_up_and_a_reference_of_zero_clamps_to_zero(implementation: str) -> None:
    x, std = planted({}, columns=4, rows=8)
    x[:, 1], std[2] = 5.0, 0.0
    for mode in ("clamp", "scale"):
        masked, ratios = mask_outliers(x, std, mode=mode, direction="both", implementation=implementation)
        assert torch.equal(masked[:, 1], x[:, 1]) and ratios[1] == pytest.approx(float(std[1]) / FLOOR)
        assert float(masked[:, 2].std()) == pytest.approx({"clamp": 0.0, "scale": 10 * FLOOR}[mode], rel=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_masked_matrix_keeps_its_dtype(implementation: str) -> None:
    for dtype in DTYPES[1:]:
        x, std = planted({1: 42.0}, columns=5, rows=8)
        masked, ratios = mask_outliers(x.to(dtype), std, mode="scale", implementation=implementation)
        assert masked.dtype == dtype and ratios.dtype == torch.float32
        assert torch.equal(masked[:, 2:], x[:, 2:].to(dtype))
        assert float(masked[:, 1].float().std() / std[1]) == pytest.approx(10, rel=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_change_no_bit(implementation: str) -> None:
    def several(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        masked, _ = mask_outliers(x, std, mode="scale", direction="both", implementation=implementation)
        return normalise(x, "hybrid", mean=mean, std=std, implementation=implementation), masked

    mean, std = references(13)
    wide = embeddings(20, 39)
    for x in (wide[::2, ::3], wide.t()[:21, :13], wide[0, :13].expand(4, 13), wide.flip(0)[3:9, 5:18]):
        for found, wanted in zip(several(x, mean, std), several(x.contiguous(), mean, std), strict=True):
            assert torch.equal(found, wanted) and found.is_contiguous()
    every_other = torch.stack((std, mean), dim=1)[:, 0]
    found = outlier_ratios(wide[:, :13], every_other, implementation=implementation)
    assert torch.equal(found, outlier_ratios(wide[:, :13], std, implementation=implementation))


def test_triton_reads_the_matrix_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    part, join, move = (counted(monkeypatch, fused, name) for name in ("_part", "_join", "_move"))
    x, (mean, std) = embeddings(4, 9), references(9)
    for done, (run, moves) in enumerate(
        (
            (lambda: mask_and_normalise(x, mean, std, outlier_mode="scale", mode="hybrid", implementation="triton"), 1),
            (lambda: normalise(x, implementation="triton"), 1),
            (lambda: mask_outliers(x, std, mode="zero", implementation="triton"), 1),
            (lambda: outlier_ratios(x, std, implementation="triton"), 0),
            (lambda: column_stats(x, implementation="triton"), 0),
        ),
        start=1,
    ):
        move.launches = 0
        run()
        assert (part.launches, join.launches, move.launches) == (done, done, moves)


@pytest.mark.parametrize("implementation", [reference, fused])
def test_what_is_not_finite_stays_visible_where_no_one_waits_for_the_device(implementation: Any) -> None:
    x, (mean, std) = embeddings(5, 41), references(41)
    x[1, 2], x[2, 35], x[3, 7] = float("nan"), float("inf"), 1e30
    bad = torch.zeros(41, dtype=torch.bool)
    bad[[2, 7, 35]] = True
    with np.errstate(invalid="ignore", over="ignore"):
        assert torch.equal(implementation.normalise(x, "per_dim", mean, std, 70.0, 3.0, 0.5).isnan().all(dim=0), bad)
        assert implementation.normalise(x, "global", None, None, 70.0, 3.0, 0.5).isnan().all()
        assert implementation.normalise(x, "hybrid", mean, std, 70.0, 3.0, 0.5).isnan().all()
        assert torch.equal(implementation.column_stats(x)[1].isnan(), bad)
        masked, ratios = implementation.mask_outliers(x, std, 1e-3, "zero", "both")
        assert torch.equal(ratios.isnan(), bad) and torch.equal(masked[:, bad].isnan(), x[:, bad].isnan())
        assert not masked[:, ~bad].any()
        found, _ = implementation.mask_and_normalise(x, mean, std, 10.0, "zero", "high", "per_dim", 70.0, 3.0, 0.5)
        assert torch.equal(found.isnan().all(dim=0), bad)


VECTOR = torch.ones(4)
BAD = [
    (lambda: normalise(torch.ones(3, 4, dtype=torch.int8)), "x must be float32, bfloat16 or float16, got int8"),
    (lambda: normalise(torch.ones(3, 4, dtype=torch.float64)), "got float64"),
    (lambda: normalise(torch.ones(4)), r"x must be a matrix .* got shape \[4\]"),
    (lambda: column_stats(torch.ones(2, 3, 4)), r"got shape \[2, 3, 4\]"),
    (lambda: normalise(torch.ones(0, 4)), r"not empty, got shape \[0, 4\]"),
    (lambda: normalise(torch.ones(3, 0)), r"not empty, got shape \[3, 0\]"),
    (lambda: normalise(torch.ones(1, 1)), "x must have at least 2 values"),
    (lambda: normalise(torch.ones(1, 4), "per_dim", mean=VECTOR, std=VECTOR), "at least 2 rows .* got 1"),
    (lambda: normalise(torch.ones(1, 4), "hybrid", mean=VECTOR, std=VECTOR), "at least 2 rows .* got 1"),
    (lambda: column_stats(torch.ones(1, 4)), "at least 2 rows .* got 1"),
    (lambda: outlier_ratios(torch.ones(1, 4), VECTOR), "at least 2 rows .* got 1"),
    (lambda: mask_outliers(torch.ones(1, 4), VECTOR), "at least 2 rows .* got 1"),
    (lambda: normalise(torch.ones(3, 4), "per_dim", std=VECTOR), "mean must be the reference's.* got None"),
    (lambda: normalise(torch.ones(3, 4), "hybrid", mean=VECTOR), "std must be the reference's.* got None"),
    (lambda: outlier_ratios(torch.ones(3, 5), VECTOR), r"std must be float32 \[5\].* got float32 \[4\]"),
    (lambda: outlier_ratios(torch.ones(3, 4), VECTOR.double()), r"std must be float32 \[4\].* got float64 \[4\]"),
    (lambda: outlier_ratios(torch.ones(3, 4), VECTOR.to("meta")), "std must be on cpu as x is, got meta"),
    (lambda: outlier_ratios(torch.ones(3, 4), -VECTOR), "std must be finite, 0 to 1e.15, got -1.0 in column 0"),
    (lambda: mask_and_normalise(torch.ones(3, 4), VECTOR / 0, VECTOR), "mean must be finite.* got inf in column 0"),
    (lambda: normalise(torch.ones(3, 4), "rows"), "mode must be one of global, per_dim, hybrid, got 'rows'"),
    (lambda: normalise(torch.ones(3, 4), target_std=0.0), "target_std must be above 0 and finite, got 0.0"),
    (lambda: normalise(torch.ones(3, 4), target_std=float("nan")), "target_std must be .* got nan"),
    (lambda: normalise(torch.ones(3, 4), clip_sigma=-1.0), "clip_sigma must be above 0 and finite, got -1.0"),
    (lambda: normalise(torch.ones(3, 4), weight=1.5), "weight must be from 0 to 1, got 1.5"),
    (lambda: mask_outliers(torch.ones(3, 4), VECTOR, threshold=float("inf")), "threshold must be .* got inf"),
    (lambda: mask_outliers(torch.ones(3, 4), VECTOR, mode="drop"), "outlier_mode must be one of .* got 'drop'"),
    (lambda: mask_outliers(torch.ones(3, 4), VECTOR, direction="up"), "direction must be one of .* got 'up'"),
    (lambda: normalise(torch.ones(3, 4), implementation="cuda"), "implementation must be one of .* got 'cuda'"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place_on_a_cpu(value: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 4, dtype=dtype)
    x[1, 2] = value
    for call in (lambda: normalise(x), lambda: column_stats(x), lambda: mask_outliers(x, VECTOR)):
        with pytest.raises(KernelError, match=f"x must be finite, .* got {value} in row 1, column 2"):
            call()


def test_triton_without_its_interpreter_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton, "JITFunction", type(fused._part))
    with pytest.raises(KernelError, match="x must be on a CUDA device for triton, got cpu"):
        ops.normalise(torch.ones(3, 4), implementation="triton")
