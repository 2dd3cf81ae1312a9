"""The recipe of the embedded model: what a cut-off training needs to go on."""

from __future__ import annotations

from pathlib import Path

import torch
from qengine.bench.tiny import edits, wordings
from qengine.bench.tiny.optim import WORKERS, Trainer
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
