"""The report on an extraction: its numbers, and a few pixels of the picture that shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qengine.engine.chart import Scale, around
from qengine.engine.vl import Knobs, RawExtraction, Statistics, blend_interpolate, condition, write_statistics
from qengine.engine.vl.figures import Outlier, report_figures
from qengine.engine.vl.plot import HEIGHT, LOWER, RIGHT, SERIES, SIDE, UPPER, WIDTH, draw_figures, draw_report
from qengine.errors import InputError, OutputError, RequestError

DIMS, BEFORE, IMAGES, AFTER = 96, 3, 40, 5
ROWS = BEFORE + 1 + IMAGES + 1 + AFTER
SPAN = slice(BEFORE + 1, BEFORE + 1 + IMAGES)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))


def statistics(dims: int = DIMS) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    return Statistics(torch.randn(dims, generator=generator), torch.rand(dims, generator=generator) + 0.5, 0.3, 61.0)


def extraction(ratios: dict[int, float] | None = None, images: int = IMAGES) -> RawExtraction:
    """Image rows whose column d has ratios[d] times the reference's std, and once the reference's elsewhere."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(BEFORE + 1 + images + 1 + AFTER, DIMS, generator=generator, dtype=torch.float64)
    inside = rows[BEFORE + 1 : BEFORE + 1 + images]
    made = (inside - inside.mean(dim=0)) / inside.std(dim=0) if images > 1 else inside
    factor = torch.ones(DIMS, dtype=torch.float64)
    for column, ratio in (ratios or {}).items():
        factor[column] = ratio
    rows[BEFORE + 1 : BEFORE + 1 + images] = made * factor * statistics().std
    segments = [0] * BEFORE + [1] + [2] * images + [3] + [4] * AFTER
    return RawExtraction(
        hidden={-6: rows.float()},
        input_ids=torch.arange(len(rows), dtype=torch.int32),
        segments=torch.tensor(segments, dtype=torch.uint8),
        grid_thw=torch.tensor([[1, 10, 16]], dtype=torch.int32),
        prompt="<|im_start|>user\n",
    )


def embeds(rows: int = 11) -> torch.Tensor:
    return torch.randn(rows, DIMS, generator=torch.Generator().manual_seed(9)) * 4


def has(image: Image.Image, colour: tuple[int, int, int], box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(image.crop(box)) == colour).all(axis=2).any())


def test_the_numbers_are_those_of_numpy_for_every_matrix() -> None:
    raw, reference, text = extraction({7: 40.0}), statistics(), embeds()
    knobs = Knobs(token_selection="image", normalization_mode="per_dim")
    result = condition(raw, knobs, statistics=reference)
    blended = blend_interpolate(result.embeddings, text, 0.3)
    found = report_figures(raw, knobs, reference, blended, text)
    states = raw.hidden[-6].numpy().astype(np.float64)
    expected = {
        "before": states[BEFORE : BEFORE + IMAGES + 2],
        "after": result.embeddings.numpy().astype(np.float64),
        "blended": blended.numpy().astype(np.float64),
    }
    assert [each.name for each in found.series] == list(expected)
    for each in found.series:
        assert each.std is not None and each.rows == len(expected[each.name])
        assert np.allclose(each.std, expected[each.name].std(axis=0, ddof=1), rtol=1e-5)
        assert each.total == pytest.approx(expected[each.name].std(ddof=1), rel=1e-5)
    assert found.measured.std is not None and found.measured.rows == IMAGES
    assert np.allclose(found.measured.std, states[SPAN].std(axis=0, ddof=1), rtol=1e-5)
    assert found.reference is not None and found.reference.total == 61.0
    assert list(found.order) == list(np.argsort(-reference.std.numpy(), kind="stable"))


def test_outliers_are_told_in_both_directions_by_falling_ratio() -> None:
    raw = extraction({4: 42.0, 9: 617.9, 20: 1 / 100, 30: 9.9})
    found = report_figures(raw, Knobs(outlier_masking="zero"), statistics())
    assert [(each.dimension, each.direction) for each in found.outliers] == [(9, "high"), (20, "low"), (4, "high")]
    assert [each.ratio for each in found.outliers] == pytest.approx([617.9, 100, 42], rel=1e-4)
    assert found.masked == (9, 4) and found.threshold == 10
    assert report_figures(raw, Knobs(), statistics()).masked is None


def test_without_statistics_the_prompt_is_the_reference_and_without_either_there_is_none() -> None:
    raw = extraction({4: 42.0})
    against_text = report_figures(raw, Knobs(), None, None, embeds())
    assert against_text.reference is not None and against_text.reference.name == "the prompt's embeddings"
    assert against_text.outliers == (Outlier(4, pytest.approx(against_text.outliers[0].ratio), "high"),)
    none = report_figures(raw)
    assert none.reference is None and none.outliers == () and [each.name for each in none.series] == ["before", "after"]
    assert none.measured.std is not None and list(none.order[:1]) == [4]


def test_statistics_in_the_cache_are_taken_where_they_fit(tmp_path: Path) -> None:
    place = tmp_path / "cache" / "statistics" / "reference.safetensors"
    place.parent.mkdir(parents=True)
    write_statistics(place, statistics(DIMS + 1))
    assert report_figures(extraction()).reference is None
    write_statistics(place, statistics())
    found = report_figures(extraction()).reference
    assert found is not None and found.name == "reference statistics"


def test_one_row_has_no_spread_and_the_picture_says_so(tmp_path: Path) -> None:
    raw = extraction(images=1)
    found = draw_report(raw, Knobs(token_selection="image_no_markers"), statistics(), tmp_path / "one.png", embeds(1))
    assert [each.std for each in found.series] == [None, None, None] and found.outliers == ()
    assert found.measured.std is None and (tmp_path / "one.png").is_file()


def test_widths_that_differ_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"blended must have {DIMS} columns"):
        report_figures(extraction(), blended=torch.zeros(3, DIMS - 1))
    with pytest.raises(RequestError, match=f"must have {DIMS} columns"):
        report_figures(extraction(), statistics=statistics(DIMS - 1))
    with pytest.raises(InputError, match="readable statistics"):
        report_figures(extraction(), statistics=tmp_path / "none.safetensors")
    with pytest.raises(OutputError, match="must end in one of"):
        draw_report(extraction(), None, None, tmp_path / "report.svg")
    assert list(tmp_path.iterdir()) == []


def test_the_picture_shows_every_matrix_the_reference_and_the_outliers(tmp_path: Path) -> None:
    raw, text = extraction({4: 42.0, 20: 1 / 100}), embeds()
    blended = blend_interpolate(condition(raw).embeddings, text, 0.3)
    draw_report(raw, None, statistics(), tmp_path / "report.png", blended, text)
    with Image.open(tmp_path / "report.png") as opened:
        image = opened.convert("RGB")
    assert image.size == (WIDTH, HEIGHT)
    upper, lower = (93, UPPER[0] + 2, RIGHT - 2, UPPER[1] - 2), (93, LOWER[0] + 2, RIGHT - 2, LOWER[1] - 2)
    for colour in ((20, 20, 20), (200, 30, 40), (20, 120, 60), (70, 120, 190)):
        assert has(image, colour, upper) and not has(image, colour, lower)
    for colour in SERIES.values():
        assert has(image, colour, lower)
    assert (np.asarray(image.crop((SIDE, UPPER[0], WIDTH, 560))) < 100).any()
    assert (np.asarray(image.crop((WIDTH - 8, 0, WIDTH, HEIGHT))) == 255).all()


def test_without_a_reference_the_picture_says_how_to_get_one() -> None:
    image = draw_figures(report_figures(extraction()))
    assert has(image, (200, 30, 40), (SIDE, UPPER[0], WIDTH, 560))
    assert not has(image, (20, 120, 60), (0, 0, WIDTH, HEIGHT)) and not has(
        image, SERIES["blended"], (0, 0, WIDTH, 990)
    )


def test_a_scale_is_logarithmic_and_its_limits_hold_every_value() -> None:
    scale = Scale(1, 1000, 100, 400)
    assert list(scale.at(np.array([0.0, 1, 10, 100, 1000, 1e9]))) == pytest.approx([100, 100, 200, 300, 400, 400])
    assert scale.ticks() == [1, 10, 100, 1000] and Scale(1, 20, 0, 1).ticks() == [1, 2, 5, 10, 20]
    low, high = around([np.array([0.0, 2.0, np.nan]), np.array([3.0])])
    assert low < 2 and high > 3 and high / low >= 10 - 1e-9
    assert around([np.zeros(3)]) == pytest.approx(around([np.ones(3)])) and around([np.array([])])[0] > 0
