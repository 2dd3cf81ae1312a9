"""From raw hidden states to embeddings: layer, mask, selection, normalisation, without a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.engine.vl import (
    EXPERIMENTAL,
    Knobs,
    RawExtraction,
    Statistics,
    blend_layers,
    condition,
    get_outlier_dimensions,
    mask_outlier_dimensions,
    report,
)
from qengine.engine.vl.condition import spread, total_std
from qengine.errors import RequestError

WIDTH, BEFORE, IMAGES, AFTER = 423, 3, 40, 8
ROWS = BEFORE + 1 + IMAGES + 1 + AFTER
SPAN = slice(BEFORE + 1, BEFORE + 1 + IMAGES)


def statistics(width: int = WIDTH, seed: int = 1) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(width, generator=generator)
    return Statistics(mean, torch.rand(width, generator=generator) * 4 + 0.5, 0.3, 61.0, -2, "tiny", ("a",), 20)


def raw_of(states: torch.Tensor, **more: torch.Tensor) -> RawExtraction:
    segments = [0] * BEFORE + [1] + [2] * IMAGES + [3] + [4] * (len(states) - BEFORE - IMAGES - 2)
    return RawExtraction(
        hidden={-6: states, **{int(name): value for name, value in more.items()}},
        input_ids=torch.arange(len(states), dtype=torch.int32),
        segments=torch.tensor(segments, dtype=torch.uint8),
        grid_thw=torch.tensor([[1, 10, 16]], dtype=torch.int32),
        prompt="<|im_start|>user\n",
        text="a house",
    )


def states(seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale


def planted(reference: Statistics, ratios: dict[int, float], rows: int = IMAGES) -> torch.Tensor:
    """Rows whose column d has std ratios[d] times the reference's, and once the reference's elsewhere."""
    made = torch.randn(rows, reference.width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    made = (made - made.mean(dim=0)) / made.std(dim=0)
    factor = torch.ones(reference.width, dtype=torch.float64)
    for column, ratio in ratios.items():
        factor[column] = ratio
    return (made * factor * reference.std + 0.25).float()


def with_image(rows: torch.Tensor) -> torch.Tensor:
    made = states()
    made[SPAN] = rows
    return made


def test_V11_global_gives_the_target_std_and_keeps_directions() -> None:
    x = states()
    found = condition(raw_of(x))
    assert found.embeddings.double().std().item() == pytest.approx(70.0, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(found.embeddings, x).min() > 1 - 1e-6
    assert found.scale_factor == pytest.approx(70.0 / x.double().std().item(), rel=1e-6)
    torch.testing.assert_close(found.embeddings, x * found.scale_factor, rtol=1e-5, atol=0)
    assert (found.original_std, found.scaled_std) == (pytest.approx(x.double().std().item()), pytest.approx(70.0, 1e-5))


def test_V11_a_constant_matrix_stays_as_it_is() -> None:
    x = torch.full((ROWS, WIDTH), 2.5)
    found = condition(raw_of(x))
    assert torch.equal(found.embeddings, x) and found.scale_factor == 1.0


@pytest.mark.parametrize("selection", ["all", "image_no_markers"])
def test_V12_per_dim_gives_the_columns_of_the_reference(selection: Any) -> None:
    reference = statistics()
    knobs = Knobs(normalization_mode="per_dim", clip_sigma=None, token_selection=selection)
    found = condition(raw_of(states()), knobs, statistics=reference).embeddings
    torch.testing.assert_close(found.mean(dim=0), reference.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.std(dim=0), reference.std, rtol=1e-4, atol=0)


def test_V12_per_dim_clamps_at_three_standard_deviations() -> None:
    x, reference = states(), statistics()
    x[7, 11] = 1000.0
    found = condition(raw_of(x), Knobs(normalization_mode="per_dim"), statistics=reference).embeddings
    assert found[7, 11].item() == pytest.approx((reference.mean + 3 * reference.std)[11].item(), rel=1e-5)


def test_V12_one_row_cannot_be_measured() -> None:
    one = RawExtraction(
        {-6: torch.ones(1, WIDTH)},
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.uint8),
        torch.empty(0, 3, dtype=torch.int32),
        "a",
    )
    with pytest.raises(RequestError, match="must have at least 2 rows to measure columns, got 1"):
        condition(one, Knobs(normalization_mode="per_dim"), statistics=statistics())


def test_V13_hybrid_is_the_mean_of_per_dim_and_global_at_the_callers_target() -> None:
    raw, reference = raw_of(states()), statistics()

    def at(mode: Any, **more: Any) -> torch.Tensor:
        return condition(raw, Knobs(normalization_mode=mode, target_std=33.0, **more), statistics=reference).embeddings

    torch.testing.assert_close(at("hybrid"), 0.5 * at("per_dim") + 0.5 * at("global"), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        at("hybrid", hybrid_weight=0.2), 0.2 * at("per_dim") + 0.8 * at("global"), rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_V14_without_scaling_the_rows_come_back_bit_by_bit(dtype: torch.dtype) -> None:
    x = states().to(dtype)
    found = condition(raw_of(x), Knobs(scale_to_text=False))
    assert torch.equal(found.embeddings, x) and found.embeddings.dtype == dtype and found.scale_factor == 1.0


def test_target_std_auto_is_that_of_the_text_it_will_meet() -> None:
    text = torch.randn(11, WIDTH) * 85
    found = condition(raw_of(states()), Knobs(target_std="auto"), text_embeds=text)
    assert total_std(found.embeddings) == pytest.approx(total_std(text), rel=1e-5)
    with pytest.raises(RequestError, match="target_std auto must have text embeddings"):
        condition(raw_of(states()), Knobs(target_std="auto"))


def test_the_robust_scale_does_not_feel_the_sink_token() -> None:
    x = states()
    x[0, 4] = 13504.0
    plain, robust = (condition(raw_of(x), Knobs(scale_stat=stat)).embeddings for stat in ("global", "robust"))
    assert spread(plain[1:], "global") < 10
    assert spread(robust, "robust") == pytest.approx(70.0, rel=1e-4)


@pytest.mark.parametrize("mode", ["zero", "clamp", "scale"])
def test_V16_masking_changes_outlier_columns_of_image_rows_and_nothing_else(mode: Any) -> None:
    reference = statistics()
    x = with_image(planted(reference, {396: 617.9, 4: 42.0}))
    before = x.clone()
    knobs = Knobs(outlier_masking=mode, scale_to_text=False)
    found = condition(raw_of(x), knobs, statistics=reference).embeddings
    assert torch.equal(x, before)
    outside = torch.ones(ROWS, dtype=torch.bool)
    outside[SPAN] = False
    assert torch.equal(found[outside], x[outside])
    columns = torch.ones(WIDTH, dtype=torch.bool)
    columns[[4, 396]] = False
    assert torch.equal(found[SPAN][:, columns], x[SPAN][:, columns])
    for column in (4, 396):
        std = found[SPAN, column].double().std().item()
        assert std == (0 if mode == "zero" else pytest.approx(10 * reference.std[column].item(), rel=1e-5))


def test_V16_masking_comes_before_selection_and_measures_image_rows_without_markers() -> None:
    reference = statistics()
    x = with_image(planted(reference, {9: 9.0}))
    x[BEFORE, 9] = x[BEFORE + 1 + IMAGES, 9] = 1e6
    found = condition(raw_of(x), Knobs(outlier_masking="zero", token_selection="image"), statistics=reference)
    assert found.masked_dimensions == []
    inside = with_image(planted(reference, {9: 11.0}))
    text = condition(raw_of(inside), Knobs(outlier_masking="zero", token_selection="text"), statistics=reference)
    assert text.masked_dimensions == [9] and text.num_tokens == BEFORE + AFTER


def test_V16_an_unknown_mode_is_an_error() -> None:
    with pytest.raises(RequestError, match="outlier_masking must be one of none, zero, clamp, scale, got 'clip'"):
        Knobs(outlier_masking="clip")  # pyright: ignore[reportArgumentType]


def test_V17_a_ratio_of_exactly_the_threshold_is_no_outlier() -> None:
    reference = Statistics(torch.zeros(2), torch.ones(2))
    for value, expected in ((10.0, []), (10.001, [1])):
        rows = torch.tensor([[1.0, -value], [0.0, 0.0], [-1.0, value]])
        _, info = mask_outlier_dimensions(rows, 10.0, "zero", statistics=reference)
        assert info["masked_dimensions"] == expected


def test_V18_masked_columns_are_reported_by_falling_ratio() -> None:
    reference = statistics()
    raw = raw_of(with_image(planted(reference, {396: 617.9, 4: 42.0})))
    found = condition(raw, Knobs(outlier_masking="clamp"), statistics=reference)
    assert found.masked_dimensions == [396, 4]
    assert found.masked_dim_ratios == {396: pytest.approx(617.9, rel=1e-3), 4: pytest.approx(42.0, rel=1e-3)}
    assert condition(raw).masked_dimensions is None and condition(raw).masked_dim_ratios is None


def test_V19_masking_alone_returns_a_matrix_and_what_was_done_and_leaves_its_input() -> None:
    reference = statistics()
    x = planted(reference, {396: 617.9, 4: 42.0}).bfloat16()
    before = x.clone()
    for mode in ("zero", "clamp", "scale"):
        made, info = mask_outlier_dimensions(x, threshold=10.0, mode=mode, statistics=reference)
        assert torch.equal(x, before) and made.dtype == x.dtype and not torch.equal(made, x)
        assert info["masked_dimensions"] == [4, 396] and list(info["ratios"]) == [4, 396]
        assert (info["mode"], info["threshold"]) == (mode, 10.0)
    same, info = mask_outlier_dimensions(x, mode="none")
    assert torch.equal(same, x) and info == {"masked_dimensions": [], "ratios": {}, "mode": "none", "threshold": 10.0}


def test_V20_outlier_columns_are_listed_by_falling_ratio() -> None:
    reference = statistics()
    found = get_outlier_dimensions(planted(reference, {4: 42.0, 396: 617.9, 7: 9.9}), 10.0, statistics=reference)
    assert found == [(396, pytest.approx(617.9, rel=1e-3)), (4, pytest.approx(42.0, rel=1e-3))]


@pytest.mark.parametrize(("direction", "expected"), [("high", [396]), ("low", [4]), ("both", [396, 4])])
def test_V21_a_column_that_is_too_quiet_is_found_in_its_own_direction(direction: Any, expected: list[int]) -> None:
    reference = statistics()
    x = planted(reference, {396: 617.9, 4: 1 / 42.0})
    found = get_outlier_dimensions(x, direction=direction, statistics=reference)
    assert [column for column, _ in found] == expected
    made, _ = mask_outlier_dimensions(x, mode="clamp", direction=direction, statistics=reference)
    for column in expected:
        size = 10.0 if column == 396 else 0.1
        assert made[:, column].std().item() == pytest.approx(size * reference.std[column].item(), rel=1e-4)


def test_clamping_before_per_dim_changes_nothing_and_zeroing_gives_the_reference_mean() -> None:
    reference = statistics()
    raw = raw_of(with_image(planted(reference, {396: 617.9, 4: 42.0})))

    def at(mode: Any) -> torch.Tensor:
        knobs = Knobs(outlier_masking=mode, normalization_mode="per_dim", token_selection="image_no_markers")
        return condition(raw, knobs, statistics=reference).embeddings

    for mode in ("clamp", "scale"):
        assert ((at(mode) - at("none")) / reference.std).abs().max() < 1e-4
    torch.testing.assert_close(at("zero")[:, 396], reference.mean[396].expand(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("knobs", [{"normalization_mode": "per_dim"}, {"outlier_masking": "zero"}])
def test_V15_missing_statistics_are_an_error_that_names_the_command(
    knobs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path))
    with pytest.raises(RequestError, match="must have reference statistics, got none") as caught:
        condition(raw_of(states()), Knobs(**knobs))
    assert "qengine stats" in str(caught.value)
    with pytest.raises(RequestError, match=f"must have {WIDTH} columns as the embeddings, got 64"):
        condition(raw_of(states()), Knobs(**knobs), statistics=statistics(64))


def test_V31_layers_are_weighed_and_one_layer_is_itself() -> None:
    h = {-2: states(2), -6: states(6)}
    torch.testing.assert_close(blend_layers(h, {-2: 0.7, -6: 0.3}), 0.7 * h[-2] + 0.3 * h[-6], rtol=0, atol=1e-6)
    torch.testing.assert_close(blend_layers(h, {-2: 7, -6: 3}), blend_layers(h, {-2: 0.7, -6: 0.3}))
    assert torch.equal(blend_layers(h, {-2: 0.4}), h[-2]) and torch.equal(blend_layers(h, -6), h[-6])
    assert torch.equal(blend_layers(h, {-2: 0.4, -6: 0}), h[-2])
    assert blend_layers({k: v.bfloat16() for k, v in h.items()}, {-2: 1, -6: 1}).dtype == torch.bfloat16
    for weights in ({}, {-2: 0.0}, {-2: -1.0, -6: 3.0}, {-2: math.nan}):
        with pytest.raises(RequestError, match="layer weights must be"):
            blend_layers(h, weights)
    with pytest.raises(RequestError, match="must be one of those extracted"):
        blend_layers(h, -3)


@pytest.mark.parametrize(
    "given",
    [
        {"token_selection": "words"},
        {"normalization_mode": "local"},
        {"outlier_direction": "up"},
        {"scale_stat": "mean"},
        {"target_std": 0},
        {"target_std": math.nan},
        {"outlier_threshold": -1},
        {"clip_sigma": 0},
        {"hybrid_weight": 1.1},
    ],
)
def test_a_knob_out_of_range_is_an_error(given: Any) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(given))} must be"):
        Knobs(**given)


def test_raw_states_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(RequestError, match="one row per token"):
        raw_of(states(), **{"-2": states()[:5]})


def test_V40_the_report_prints_what_can_be_computed_again() -> None:
    x, reference = with_image(planted(statistics(), {396: 617.9})), statistics()
    raw = raw_of(x)
    image = x[SPAN]
    rest = torch.cat([x[: BEFORE + 1], x[BEFORE + 1 + IMAGES :]])
    lines = report(raw)
    assert f"tokens: {ROWS}, of which {IMAGES} image tokens" in lines
    assert f"layer -6: std of all {x.std():.4f}, image {image.std():.4f}, text {rest.std():.4f}" in lines
    found = condition(raw, Knobs(outlier_masking="zero"), statistics=reference)
    lines = report(found)
    masked = x.clone()
    masked[SPAN, 396] = 0
    assert f"std before: {masked.double().std():.4f}" in lines
    assert f"std after: {found.embeddings.double().std():.4f} (global, factor {found.scale_factor:.4f})" in lines
    assert "outliers above 10 (zero): 396 (617.9x)" in lines


def test_V39_the_report_says_once_that_this_is_experimental() -> None:
    assert report(condition(raw_of(states()))).count(EXPERIMENTAL) == 1


def test_what_does_little_is_said_once() -> None:
    reference = statistics()
    raw = raw_of(states())
    text = condition(raw, Knobs(token_selection="text"))
    assert [line for line in report(text) if line.startswith("note:")] == [f"note: {note}" for note in text.notes]
    assert len(text.notes) == 1 and "attention" in text.notes[0]
    assert any("per_dim" in note for note in condition(raw, Knobs(token_selection="image")).notes)
    redundant = Knobs(token_selection="image", normalization_mode="per_dim", outlier_masking="clamp")
    assert any("changes nothing" in note for note in condition(raw, redundant, statistics=reference).notes)
    assert condition(raw).notes == ()
