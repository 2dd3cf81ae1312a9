"""Procedural pictures: the only training data, so the recipe needs no photo and repeats from a seed.

A dead-leaves model (overlapping shapes with a power law of sizes, the later ones in front) has the edge and scale
statistics of photographs; each leaf is shaded and textured with 1/f noise, stripes or strokes, and the whole is lit by
a smooth field, so that a network trained here transfers to photos.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256


def _noise_bank(rng: np.random.Generator, count: int) -> np.ndarray:
    """1/f^a noise fields of unit deviation, [count, SIZE, SIZE], a between 0.6 (grain) and 2.2 (clouds)."""
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]
    stretch = np.exp(rng.normal(0, 0.5, count))
    fields = []
    for slope, s in zip(rng.uniform(0.6, 2.2, count), stretch, strict=True):
        radius = np.hypot(fy * s, fx / s)
        radius[0, 0] = 1.0
        spectrum = np.fft.rfft2(rng.normal(size=(SIZE, SIZE))) / radius**slope
        spectrum[0, 0] = 0
        field = np.fft.irfft2(spectrum, (SIZE, SIZE))
        fields.append(field / field.std())
    return np.stack(fields).astype(np.float32)


class _Painter:
    """Draws one picture after another from one random stream."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise = _noise_bank(self.rng, 48)

    def field(self, height: int, width: int) -> np.ndarray:
        """A random window of a random noise field, [height, width]."""
        field = np.roll(self.noise[self.rng.integers(len(self.noise))], tuple(self.rng.integers(SIZE, size=2)), (0, 1))
        if self.rng.random() < 0.5:
            field = field.T
        return field[:height, :width]

    def colour(self, base: np.ndarray, spread: float) -> np.ndarray:
        """A colour near the picture's own palette, or now and then any colour at all."""
        if self.rng.random() < 0.15:
            return self.rng.random(3)
        return np.clip(base + self.rng.normal(0, spread, 3) + self.rng.normal(0, 0.22), 0, 1)

    def surface(self, height: int, width: int, colour: np.ndarray, texture: float) -> np.ndarray:
        """A shaded, textured patch, [height, width, 3]."""
        y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(height, width, 1)
        angle = self.rng.uniform(0, 2 * np.pi)
        ramp = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
        patch = colour + ramp[..., None] * self.rng.normal(0, 0.18, 3)
        kind = self.rng.random()
        if kind < 0.55:
            patch = patch + self.field(height, width)[..., None] * (texture * self.rng.uniform(0.4, 1.3, 3))
        elif kind < 0.68:
            waves = np.sin(ramp * self.rng.uniform(8, 90) + self.field(height, width) * self.rng.uniform(0, 1.5))
            if self.rng.random() < 0.4:
                waves = np.sign(waves)
            patch = patch + waves[..., None] * (self.rng.normal(0, 0.12, 3) + self.rng.normal(0, 0.06))
        return patch

    def leaf(self, canvas: np.ndarray, base: np.ndarray, spread: float, texture: float) -> None:
        """Paints one shape over the canvas [SIZE, SIZE, 3] in place."""
        rng = self.rng
        radius = min(5.0 / max(rng.random(), 1e-3) ** 0.85, 110.0)
        cy, cx = rng.uniform(-10, SIZE + 10, 2)
        top, left = int(max(cy - radius - 2, 0)), int(max(cx - radius - 2, 0))
        bottom, right = int(min(cy + radius + 2, SIZE)), int(min(cx + radius + 2, SIZE))
        if bottom - top < 2 or right - left < 2:
            return
        scale = 3 if radius < 50 else 2
        corners = 24 if rng.random() < 0.5 else int(rng.integers(3, 7))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners)) if corners < 24 else np.linspace(0, 2 * np.pi, 24)
        wobble = radius * (1 - rng.random() * 0.35 * rng.random(corners))
        aspect, turn = rng.uniform(0.35, 1.0), rng.uniform(0, np.pi)
        px, py = wobble * np.cos(angles), wobble * np.sin(angles) * aspect
        xs = (cx - left + px * np.cos(turn) - py * np.sin(turn)) * scale
        ys = (cy - top + px * np.sin(turn) + py * np.cos(turn)) * scale
        mask = Image.new("L", ((right - left) * scale, (bottom - top) * scale))
        ImageDraw.Draw(mask).polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=255)
        mask = mask.resize((right - left, bottom - top), Image.Resampling.BOX)
        if rng.random() < 0.25:
            mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 4))))
        alpha = np.asarray(mask, np.float32)[..., None] / 255
        patch = self.surface(bottom - top, right - left, self.colour(base, spread), texture)
        region = canvas[top:bottom, left:right]
        region += alpha * (patch - region)

    def strokes(self, canvas: np.ndarray) -> np.ndarray:
        """Thin lines in one direction: hair, grass, cables."""
        rng = self.rng
        image = Image.fromarray((np.clip(canvas, 0, 1) * 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        angle, colour = rng.uniform(0, np.pi), rng.random(3)
        for _ in range(int(rng.integers(10, 160))):
            x, y = rng.uniform(0, SIZE, 2)
            a, length = angle + rng.normal(0, 0.25), rng.uniform(8, 60)
            shade = tuple(int(v) for v in np.clip(colour + rng.normal(0, 0.15), 0, 1) * 255)
            end = (x + length * np.cos(a), y + length * np.sin(a))
            draw.line(((x, y), end), fill=shade, width=int(rng.integers(1, 3)))
        return np.asarray(image, np.float32) / 255

    def paint(self) -> np.ndarray:
        """One picture, uint8 [SIZE, SIZE, 3]."""
        rng = self.rng
        base, spread = rng.uniform(0.2, 0.8) + rng.normal(0, 0.15, 3), rng.uniform(0.05, 0.3)
        texture = 0.02 + 0.16 * rng.random() ** 2
        canvas = self.surface(SIZE, SIZE, self.colour(base, spread), texture).astype(np.float32)
        for _ in range(int(np.exp(rng.uniform(2.5, 6.0)))):
            self.leaf(canvas, base, spread, texture)
        if rng.random() < 0.25:
            canvas = self.strokes(canvas)
        light = np.exp(rng.normal(0, 0.2, (4, 4)) + rng.normal(-0.1, 0.2)).astype(np.float32)
        smooth = np.asarray(Image.fromarray(light).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        gray = canvas.mean(-1, keepdims=True)
        canvas = gray + (canvas - gray) * rng.uniform(0.3, 1.1)
        canvas = np.clip(canvas * smooth[..., None], 0, 1) ** np.exp(rng.normal(0, 0.3))
        image = Image.fromarray((canvas * 255 + 0.5).astype(np.uint8))
        if rng.random() < 0.3:
            image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 2.5))))
        return np.asarray(image)


def paint(count: int, seed: int) -> torch.Tensor:
    """`count` pictures, uint8 [count, 3, SIZE, SIZE]; the same seed gives the same pictures."""
    painter = _Painter(seed)
    return torch.from_numpy(np.stack([painter.paint() for _ in range(count)])).permute(0, 3, 1, 2).contiguous()


def crops(pool: torch.Tensor, count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Random views of random pictures, [count, 3, height, width] in [0, 1].

    The view is taken at full size or shrunk (which makes it as sharp as a small photo), then flipped at random.
    """
    views = []
    for index in torch.randint(len(pool), (count,), generator=generator).tolist():
        limit = SIZE / max(height, width)
        zoom = 1 + (min(limit, 3.0) - 1) * float(torch.rand((), generator=generator)) ** 2
        h, w = round(height * zoom), round(width * zoom)
        top = int(torch.randint(SIZE - h + 1, (), generator=generator))
        left = int(torch.randint(SIZE - w + 1, (), generator=generator))
        view = pool[index, :, top : top + h, left : left + w].float() / 255
        if (h, w) != (height, width):
            view = F.interpolate(view[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
        for axis in (1, 2):
            if torch.rand((), generator=generator) < 0.5:
                view = view.flip(axis)
        views.append(view)
    return torch.stack(views)
