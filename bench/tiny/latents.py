"""Encoded pictures: each with all of its true edits, as the transformer sees them.

Encoding costs more than a training step, so pictures are encoded once with all edits, cut into many different crops,
and replaced slowly. Long strips cost no more than squares and teach the distances that occur in 256 and 512 pixel
images. Crops start at whole tokens, so that the blocks of `pixelate` stay on the token grid.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import edits, pictures
from .optim import WORKERS
from .vae import CHANNELS, FACTOR, VAE

SHAPES = ((128, 128), (128, 128), (128, 128), (256, 64), (64, 256), (512, 32), (32, 512))
CHANCES = (1.0, 1.3, 2.0, 1.0, 1.0, 1.0, 1.3, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.5, 1.5)


@dataclass(frozen=True)
class Batch:
    """Packed latents of one half batch: tokens are [n, h * w, 64], edits [n] index `edits.NAMES`."""

    reference: torch.Tensor
    target: torch.Tensor
    edits: torch.Tensor
    grid: tuple[int, int]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[n, 16, 2h, 2w] -> [n, h * w, 64], the order of the pipelines: channel, then row and column in the patch."""
    n, channels, height, width = latents.shape
    tiles = latents.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(n, -1, channels * 4)


class Store:
    """Entries [15 edits, 16, h, w]; the entry of `keep` is the reference."""

    def __init__(self, weights: dict[str, torch.Tensor], pool: torch.Tensor, count: int, seed: int) -> None:
        self.vae = VAE()
        self.vae.load_state_dict({k: v for k, v in weights.items() if not k.startswith("latents_")})
        self.vae.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.mean, self.std = (weights[k].view(CHANNELS, 1, 1) for k in ("latents_mean", "latents_std"))
        self.pool, self.seed, self.made = pool, seed, 0
        self.workers = ThreadPoolExecutor(WORKERS)
        self.entries = list(self.workers.map(self.encode, range(count)))
        self.made = count

    @torch.no_grad()
    def encode(self, number: int) -> torch.Tensor:
        """The entry of a given number: a view of a picture in the shape whose turn it is, and all its edits."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        height, width = SHAPES[number % len(SHAPES)]
        shrink = 2 if max(height, width) > pictures.SIZE else 1
        view = pictures.crops(self.pool, 1, height // shrink, width // shrink, generator)
        if shrink > 1:
            view = F.interpolate(view, (height, width), mode="bilinear").clamp(0, 1)
        views = torch.cat([edits.apply(name, view) for name in edits.NAMES]) * 2 - 1
        mean, _ = self.vae.encode(views.contiguous(memory_format=torch.channels_last))
        return ((mean - self.mean) / self.std).contiguous()

    def refresh(self) -> None:
        """Replaces the oldest entries, one per core, by new ones."""
        for entry in self.workers.map(self.encode, range(self.made, self.made + WORKERS)):
            self.entries[self.made % len(self.entries)] = entry
            self.made += 1

    def sample(self, count: int, area: int, generator: torch.Generator) -> Batch:
        """Crops of about `area` tokens from entries of one shape, one edit each."""

        def draw(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        kind = draw(len(SHAPES))
        rows, columns = (side // (2 * FACTOR) for side in SHAPES[kind])
        height = min(rows, max(area // columns, round(area**0.5)))
        width = min(columns, area // height)
        chosen = torch.multinomial(torch.tensor(CHANCES), count, replacement=True, generator=generator)
        same = range(kind, len(self.entries), len(SHAPES))
        sources, targets = [], []
        for edit in chosen.tolist():
            entry = self.entries[same[draw(len(same))]]
            top, left = 2 * draw(rows - height + 1), 2 * draw(columns - width + 1)
            cut = entry[:, :, top : top + 2 * height, left : left + 2 * width]
            sources.append(cut[0])
            targets.append(cut[edit])
        return Batch(pack(torch.stack(sources)), pack(torch.stack(targets)), chosen, (height, width))
