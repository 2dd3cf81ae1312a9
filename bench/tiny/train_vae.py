"""First stage: the image VAE, on crops of procedural pictures and of their edits."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from . import edits, pictures
from .optim import WORKERS, Trainer
from .vae import CHANNELS, VAE

STEPS, BATCH, RATE, EMA = 3000, 10, 2.5e-3, 0.998
SIDES = ((48, 48), (48, 48), (32, 64), (64, 32), (40, 40), (80, 80))
KL_WEIGHT = 2e-3
log = logging.getLogger(__name__)


def batch(pool: torch.Tensor, step: int, part: int, seed: int) -> torch.Tensor:
    """Crops of step `step` in [-1, 1], half of them edited: the decoder has to draw edited pictures too."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * WORKERS + part)
    height, width = SIDES[step % len(SIDES)]
    count = max(2, BATCH // WORKERS * 48 * 48 // (height * width))
    views = pictures.crops(pool, count, height, width, generator)
    for index in range(0, count, 2):
        name = edits.NAMES[int(torch.randint(len(edits.NAMES), (), generator=generator))]
        views[index] = edits.apply(name, views[index])
    return (views * 2 - 1).contiguous(memory_format=torch.channels_last)


def loss_of(vae: VAE, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Root of squared error + gradients + a little KL.

    The KL term gives the latents a scale and the sampled noise makes the decoder forgive small errors of the
    transformer; squared error (not absolute) because the evaluation speaks in PSNR.
    """
    mean, log_variance = vae.encode(pixels)
    noise = torch.randn(mean.shape, generator=generator)
    out = vae.decode(mean + noise * (0.5 * log_variance).exp())
    squared = F.mse_loss(out, pixels)
    error = out - pixels
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) * 0.5
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (squared + 1e-6).sqrt() + 0.25 * edges + KL_WEIGHT * kl


def train(pool: torch.Tensor, folder: Path, seed: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Trains, or goes on from `folder/vae-state.safetensors`.

    Returns:
        The averaged weights in 2-D, and `latents_mean` and `latents_std` [16] over edited pictures.
    """
    torch.manual_seed(seed)
    vae = VAE().to(memory_format=torch.channels_last)
    for block in (vae.encoder.mid_block, vae.decoder.mid_block):
        torch.nn.init.zeros_(block.attentions[0].proj.weight)
    trainer = Trainer(vae, RATE, steps, EMA, slow=("conv_in", "decoder.conv_out"))
    path = folder / "vae-state.safetensors"
    if path.exists():
        trainer.load(path)
    started = time.process_time()
    while trainer.done < steps:
        step = trainer.done

        def part(index: int, step: int = step) -> torch.Tensor:
            return loss_of(vae, batch(pool, step, index, seed), torch.Generator().manual_seed(step * WORKERS + index))

        loss = trainer.step([partial(part, index) for index in range(WORKERS)])
        if step % 100 == 0:
            log.info("vae %d: loss %.4f, %.0f s of CPU", step, loss, time.process_time() - started)
        if trainer.done % 500 == 0 or trainer.done == steps:
            trainer.save(path)
    return finish(vae, trainer.averaged(), pool, seed)


@torch.no_grad()
def finish(vae: VAE, weights: dict[str, torch.Tensor], pool: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Adds the latents' statistics: the transformer sees them at mean 0 and deviation 1."""
    vae.load_state_dict(weights)
    latents = torch.cat([vae.encode(batch(pool, 10**6 + i * len(SIDES), 0, seed))[0] for i in range(24)])
    flat = latents.transpose(0, 1).reshape(CHANNELS, -1)
    return {**weights, "latents_mean": flat.mean(1), "latents_std": flat.std(1)}
