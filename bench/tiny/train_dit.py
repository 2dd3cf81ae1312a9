"""Third stage: the transformer, by flow matching on encoded pairs of picture and edit."""

from __future__ import annotations

import logging
import random
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from . import dit, text, wordings
from .forward import velocity
from .latents import Batch, Store
from .optim import WORKERS, Trainer

STEPS, RATE, EMA = 2000, 2e-3, 0.998
TOKENS = 2048
ENTRIES, REFRESH = 280, 10
WORDINGS = 150
SHIFT, CERTAIN_NOISE, SOFT_SIGMA = 1.8, 0.15, 0.1
# From a share of the training onward, the areas (in tokens of 8 x 8 pixels) to draw from.
AREAS = ((0.0, (36, 64, 64)), (0.45, (64, 64, 144)), (0.8, (64, 144, 256)))
log = logging.getLogger(__name__)


class Prompts:
    """Embeddings of many training wordings of each edit, each with some random condition picture."""

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, pool: torch.Tensor, seed: int
    ) -> None:
        encode, shots, rng = (
            text.Conditioner(model, tokenizer),
            text.thumbnails(pool, 150, seed + 1),
            random.Random(seed),
        )
        self.rows: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for name in wordings.NAMES:
                said = [wordings.CANONICAL[name]] * 10
                said += [wordings.sample(name, rng) for _ in range(WORDINGS - len(said))]
                hidden, mask = encode(said, [rng.choice(shots) for _ in said])
                self.rows.append([row[real] for row, real in zip(hidden, mask, strict=True)])

    def draw(self, edits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One wording per edit: embeddings padded to the longest, [n, length, 96], and their mask."""
        picks = torch.randint(WORDINGS, (len(edits),), generator=generator).tolist()
        rows = [self.rows[edit][pick] for edit, pick in zip(edits.tolist(), picks, strict=True)]
        mask = torch.nn.utils.rnn.pad_sequence([row.new_ones(len(row)) for row in rows], batch_first=True)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask.bool()


def draw_sigma(count: int, generator: torch.Generator) -> torch.Tensor:
    """15 % of pure noise, where every run starts; the rest uniform, shifted by 1.8 towards noise."""
    uniform = torch.rand(count, generator=generator)
    shifted = (SHIFT * uniform / (1 + (SHIFT - 1) * uniform)).clamp(min=0.02)
    return torch.where(torch.rand(count, generator=generator) < CERTAIN_NOISE, 1.0, shifted)


def loss_of(
    model: QwenImageTransformer2DModel, batch: Batch, prompts: Prompts, generator: torch.Generator
) -> torch.Tensor:
    """Squared error of the velocity noise - target.

    The weight sigma^2 / (sigma^2 + 0.1^2) takes out the end of the run, where the velocity is an error of the estimate
    divided by sigma: large, and without weight in the result.
    """
    sigma = draw_sigma(len(batch.edits), generator)
    noise = torch.randn(batch.target.shape, generator=generator)
    embeds, mask = prompts.draw(batch.edits, generator)
    at = sigma[:, None, None]
    noisy = (1 - at) * batch.target + at * noise
    found = velocity(model, noisy, batch.reference, batch.grid, sigma, embeds, mask)
    weight = sigma.square() / (sigma.square() + SOFT_SIGMA**2)
    return (weight * (found - (noise - batch.target)).square().mean((1, 2))).mean()


def area_at(step: int, steps: int, generator: torch.Generator) -> int:
    """Tokens per crop: small crops first, larger ones towards the end."""
    areas = next(choice for start, choice in reversed(AREAS) if step >= start * steps)
    return areas[int(torch.randint(len(areas), (), generator=generator))]


def train(store: Store, prompts: Prompts, folder: Path, seed: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Trains, or goes on from `folder/dit-state.safetensors`; returns the averaged weights."""
    model = dit.build(seed)
    trainer = Trainer(model, RATE, steps, EMA, slow=("img_in", "txt_in", "proj_out", "time_text_embed", "norm_out"))
    path = folder / "dit-state.safetensors"
    if path.exists():
        trainer.load(path)
    started, mean = time.process_time(), 0.0
    while trainer.done < steps:
        step = trainer.done
        if step % REFRESH == REFRESH - 1:
            store.refresh()
        area = area_at(step, steps, torch.Generator().manual_seed(step))

        def part(index: int, step: int = step, area: int = area) -> torch.Tensor:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * WORKERS + index)
            batch = store.sample(TOKENS // WORKERS // area, area, generator)
            return loss_of(model, batch, prompts, generator)

        loss = trainer.step([partial(part, index) for index in range(WORKERS)])
        mean = loss if step == 0 else 0.98 * mean + 0.02 * loss
        if step % 50 == 0:
            log.info("dit %d: loss %.4f, mean %.4f, %.0f s of CPU", step, loss, mean, time.process_time() - started)
        if trainer.done % 200 == 0 or trainer.done == steps:
            trainer.save(path)
    return trainer.averaged()
