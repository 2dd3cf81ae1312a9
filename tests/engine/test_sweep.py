"""Shares and strengths of a sweep: their cells, their names, and what is encoded once for all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine.engine.qx import JobFile
from qengine.engine.request import GenerateRequest
from qengine.engine.session import Engine
from qengine.engine.sweep import Axes, Cell, encoded, prepared
from qengine.errors import RequestError
from qxjobs import raw_of
from zpipelines import build_zimage

PROMPT = "a cat"
FIELDS: dict[str, Any] = {"prompt": PROMPT, "size": (32, 32), "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = build_zimage(tmp_path_factory.mktemp("sweep") / "tiny-z-image-turbo", cap_feat_dim=64)
    return Engine.open(folder, device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def start(tmp_path: Path) -> str:
    values = np.random.default_rng(7).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "start.png")
    return str(tmp_path / "start.png")


def job() -> JobFile:
    return JobFile(raw=raw_of(1, (-6,)))


def picture(engine: Engine, request: GenerateRequest) -> np.ndarray:
    *_, decoded = engine.stream(request)
    return np.asarray(decoded.image)


def test_cells_go_row_by_row_and_carry_their_numbers_in_their_names() -> None:
    axes = Axes((0.0, 0.3, 0.125), (0.7, 1.0))
    stems = [cell.stem for cell in axes.cells]
    assert stems[:3] == ["alpha_0.00_strength_0.70", "alpha_0.00_strength_1.00", "alpha_0.30_strength_0.70"]
    assert stems[-1] == "alpha_0.125_strength_1.00" and len(set(stems)) == 6
    assert axes.cells[2].label == "alpha 0.30, strength 0.70"
    assert axes.headings == (["alpha 0.00", "alpha 0.30", "alpha 0.125"], ["strength 0.70", "strength 1.00"])
    assert Axes((0.2,)).cells == (Cell(0.2, None),) and Cell(0.2, None).stem == "alpha_0.20"
    assert Cell(None, None).stem == "picture" and Axes().cells == (Cell(None, None),)


@pytest.mark.parametrize(
    ("alphas", "strengths", "said"),
    [
        ((0.0, 1.1), (0.5,), "alphas must be from 0 to 1, got 1.1"),
        ((0.0, float("nan")), (0.5,), "alphas must be from 0 to 1, got nan"),
        ((0.0,), (-0.1, 0.5), "strengths must be from 0 to 1, got -0.1"),
        ((0.3, 0.30), (0.5,), "alphas must be different, got 0.30, 0.30"),
        ((), (0.5,), "alphas must be different, got none"),
        (tuple(n / 100 for n in range(101)), tuple(n / 100 for n in range(101)), "at most 1000 cells"),
    ],
)
def test_values_out_of_range_or_twice_are_refused(
    alphas: tuple[float, ...], strengths: tuple[float, ...], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        Axes(alphas, strengths)


@pytest.mark.slow
def test_S19_the_row_of_alpha_0_is_the_run_without_a_picture_bit_by_bit(engine: Engine, start: str) -> None:
    axes, fields = Axes((0.0, 0.6), (0.5, 1.0)), {**FIELDS, "init_image": start}
    ready = encoded(engine, job(), fields)
    made = {cell: picture(engine, each.request) for cell, each in prepared(engine, ready, axes, fields, axes.cells)}
    assert list(made) == list(axes.cells)
    for strength in axes.strengths:
        plain = picture(engine, GenerateRequest(**fields, strength=strength))
        assert np.array_equal(made[Cell(0.0, strength)], plain)
        assert not np.array_equal(made[Cell(0.6, strength)], plain)


def test_S20_text_and_start_are_encoded_once_for_all_cells(
    engine: Engine, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes, fields = Axes((0.0, 0.3), (0.5, 1.0)), {**FIELDS, "init_image": start}
    ready = encoded(engine, job(), fields)
    assert ready.given.init is not None and ready.given.prompt_embeds is not None
    assert ready.raw is not None and ready.knobs == job().knobs
    vae = engine._components.vae
    monkeypatch.setattr(type(vae), "encode", lambda *_: pytest.fail("a cell encodes a picture"))
    monkeypatch.setattr(engine._components, "condition", lambda *_, **__: pytest.fail("a cell encodes a prompt"))
    for _, each in prepared(engine, ready, axes, fields, axes.cells):
        assert picture(engine, each.request).shape == (32, 32, 3)


def test_only_the_cells_that_are_wanted_are_prepared(engine: Engine) -> None:
    axes = Axes((0.0, 0.3, 0.5))
    ready = encoded(engine, job(), FIELDS)
    todo = [Cell(0.5, None), Cell(0.0, None)]
    found = [cell for cell, _ in prepared(engine, ready, axes, FIELDS, todo)]
    assert found == [Cell(0.0, None), Cell(0.5, None)]


def test_what_a_file_encoded_of_the_same_prompt_is_taken_as_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = encoded(engine, job(), FIELDS)
    monkeypatch.setattr(engine, "extract", lambda *_, **__: pytest.fail("it is encoded again"))
    assert encoded(engine, ready, FIELDS) is ready
    with pytest.raises(pytest.fail.Exception, match="again"):
        encoded(engine, ready, {**FIELDS, "prompt": "a dog"})


def test_the_latents_of_a_file_stay_where_another_prompt_is_asked(engine: Engine, start: str) -> None:
    ready = encoded(engine, job(), {**FIELDS, "init_image": start})
    other = encoded(engine, ready, {**FIELDS, "prompt": "a dog"})
    assert ready.given.init is not None and other.given.init is ready.given.init and other.prompt == "a dog"
    assert other.given.prompt_embeds is not None and ready.given.prompt_embeds is not None
    assert not torch.equal(other.given.prompt_embeds, ready.given.prompt_embeds)
    assert replace(other, given=ready.given, prompt=PROMPT).knobs == ready.knobs


def test_S21_the_grid_has_a_row_per_alpha_and_a_column_per_strength() -> None:
    axes = Axes((0.0, 0.3), (0.7, 0.8, 0.9))
    shown = {cell: Image.new("RGB", (128, 64), (20 * number, 0, 0)) for number, cell in enumerate(axes.cells, 1)}
    grid, notes = axes.grid(shown, "a cat")
    bare, _ = Axes((0.0,), (0.7, 0.8, 0.9)).grid({}, "a cat")
    assert notes == () and grid.width > 3 * 128 and bare.width > 3 * 256
    reds = [
        grid.getpixel((grid.width - 128 * (3 - column) + 4, grid.height - 64 * (2 - row) + 4))
        for row in range(2)
        for column in range(3)
    ]
    assert reds == [(20 * number, 0, 0) for number in range(1, 7)]
