"""The recipe of the embedded model: what a cut-off training needs to go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from qengine import Engine
from qengine.bench.tiny import __main__ as recipe
from qengine.bench.tiny import edits, text, train_dit, train_vae, wordings
from qengine.bench.tiny.optim import WORKERS, Trainer
from qengine.engine.defaults import DEFAULTS
from torch import nn


def _steps(trainer: Trainer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        trainer.step([lambda x=x: trainer.module(x).square().mean()] * WORKERS)


def _trainer() -> Trainer:
    torch.manual_seed(3)
    return Trainer(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)), 1e-2, 20, 0.9, slow=("1.",))


def test_a_training_that_was_cut_off_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = _trainer()
    _steps(whole, 0, 8)
    cut = _trainer()
    _steps(cut, 0, 5)
    cut.save(tmp_path / "state.safetensors")
    again = _trainer()
    again.load(tmp_path / "state.safetensors")
    _steps(again, 5, 8)
    assert again.done == 8
    assert all(torch.equal(a, b) for a, b in zip(whole.averaged().values(), again.averaged().values(), strict=True))


def test_every_edit_has_wordings_in_training_and_held_out_ones() -> None:
    assert len(edits.NAMES) >= 14
    for name in edits.NAMES:
        assert len(wordings.TRAIN[name]) >= 3 and len(wordings.HELD_OUT[name]) >= 3


def test_the_recipe_runs_from_nothing_to_a_model_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PICTURES", 4)
    for module in (train_vae, text, train_dit):
        monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(train_vae.train, "__defaults__", (2,))
    monkeypatch.setattr(train_dit.train, "__defaults__", (2,))
    monkeypatch.setattr(train_dit, "ENTRIES", 7)
    monkeypatch.setattr(train_dit, "WORDINGS", 11)
    recipe.retrain(tmp_path / "work", tmp_path / "model", seed=3)
    assert sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file()) <= 16e6
    picture = Image.new("RGB", (64, 64), "red")
    with Engine.open(tmp_path / "model", device="cpu", cache_dir=tmp_path / "cache") as engine:
        assert engine.defaults == DEFAULTS["tiny"]
        engine.edit(picture, "make it night", size=(64, 64), num_inference_steps=1)
