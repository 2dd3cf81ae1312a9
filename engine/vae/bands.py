"""Convolutions over a map that arrives in bands of rows, from top to bottom.

Every stage takes the next rows of its input and returns the rows of its output that are now complete. What a 3x3
convolution still needs of the rows it has seen (the last two) it keeps. So nothing is computed twice, only the true
border of the image is padded with zeros, and the result equals the whole map's within float rounding. Memory is one
band and a few rows per layer, however tall the image is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .cut import Cut, split_evenly
from .layers import Conv, Norm, Residual


class Stage(Protocol):
    """One step of a chain; it serves one image and is then spent."""

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """Take the next rows [B, C, n, W]; return finished output rows, None only while there are none.

        ``last`` says that these rows end the image; then every output row that is left is returned.
        """
        ...


def _buffer(like: Tensor, height: int, width: int) -> Tensor:
    shape = (*like.shape[:2], height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class _Halo:
    """Puts the rows above (kept from before, or zeros) and, at the image's end, a zero row below into one buffer."""

    def __init__(self, norm: Norm | None) -> None:
        self._norm = norm
        self._above: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """Return the buffer [B, C, n + 2, W] around the n output rows that it completes."""
        height, width = rows.shape[2:]
        above = self._above
        top = 1 if above is None else above.shape[2]
        buffer = _buffer(rows, top + height + last, width)
        if above is None:
            buffer[:, :, :1].zero_()
        else:
            buffer[:, :, :top].copy_(above)
        inner = buffer[:, :, top : top + height]
        if self._norm is None:
            inner.copy_(rows)
        else:
            self._norm.into(rows, inner)
        if last:
            buffer[:, :, -1:].zero_()
        self._above = None if last else buffer[:, :, -2:].clone()
        return buffer if buffer.shape[2] > 2 else None


class Conv3x3:
    """An optional norm with silu, then a 3x3 convolution padded by one."""

    def __init__(self, conv: Conv, norm: Norm | None = None) -> None:
        self._conv = conv
        self._halo = _Halo(norm)

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """See `Stage.push`."""
        buffer = self._halo.push(rows, last)
        if buffer is None:
            return None
        return self._conv.over(buffer, padding=(0, 1))


class ResidualRows:
    """A residual block; the skip rows wait for the two rows that the convolutions lag behind."""

    def __init__(self, block: Residual) -> None:
        self._first = Conv3x3(block.conv1, block.norm1)
        self._second = Conv3x3(block.conv2, block.norm2)
        self._shortcut = block.shortcut
        self._waiting: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """See `Stage.push`."""
        y = self._first.push(rows, last)
        if y is not None:
            y = self._second.push(y, last)
        skip = rows if self._shortcut is None else self._shortcut.pointwise(rows)
        if y is None:
            self._waiting = skip.clone() if self._waiting is None else torch.cat((self._waiting, skip), 2)
            return None
        old = 0
        if self._waiting is not None:
            old = min(self._waiting.shape[2], y.shape[2])
            y[:, :, :old].add_(self._waiting[:, :, :old])
        fresh = y.shape[2] - old
        y[:, :, old:].add_(skip[:, :, :fresh])
        left = skip[:, :, fresh:]
        if self._waiting is not None and old < self._waiting.shape[2]:
            left = torch.cat((self._waiting[:, :, old:], left), 2)
        self._waiting = left.clone()
        return y


class Upsample:
    """Doubling by repetition and a 3x3 convolution, folded into one (`Conv.read_upsampling`)."""

    def __init__(self, folded: Conv) -> None:
        self._conv = folded
        self._halo = _Halo(None)

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """See `Stage.push`; every source row gives two rows."""
        buffer = self._halo.push(rows, last)
        if buffer is None:
            return None
        batch, _, height, width = buffer.shape
        height -= 2
        channels = self._conv.outputs // 4
        phases = self._conv.over(buffer, padding=(0, 1)).permute(0, 2, 3, 1)
        del buffer
        out = rows.new_empty((batch, height, 2, width, 2, channels))
        for odd_row in (0, 1):
            for odd_column in (0, 1):
                first = (2 * odd_row + odd_column) * channels
                source = phases[:, odd_row : odd_row + height, odd_column : odd_column + width]
                out[:, :, odd_row, :, odd_column] = source[..., first : first + channels]
        return out.view(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Downsample:
    """A 3x3 convolution of stride two, padded by one at the right and at the bottom only."""

    def __init__(self, conv: Conv) -> None:
        self._conv = conv
        self._kept: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """See `Stage.push`; every two source rows give one row."""
        height, width = rows.shape[2:]
        kept = 0 if self._kept is None else self._kept.shape[2]
        total = kept + height + last
        buffer = _buffer(rows, total, width + 1)
        if self._kept is not None:
            buffer[:, :, :kept].copy_(self._kept)
        buffer[:, :, kept : kept + height, :width].copy_(rows)
        buffer[:, :, :, width:].zero_()
        if last:
            buffer[:, :, -1:].zero_()
        finished = max(0, (total - 1) // 2)
        self._kept = buffer[:, :, 2 * finished :].clone()
        if not finished:
            return None
        return self._conv.over(buffer, stride=2)


class Join:
    """Collects bands until they are as tall as the cut has them, so that small maps are not convolved in slivers."""

    def __init__(self, cut: Cut, channels: int, scale: int) -> None:
        self._cut = cut
        self._channels = channels
        self._scale = scale
        self._waiting: list[Tensor] = []

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """See `Stage.push`."""
        self._waiting.append(rows)
        tall = self._cut.rows(rows.shape[3], self._channels, self._scale)
        if not last and sum(band.shape[2] for band in self._waiting) < tall:
            return None
        joined, self._waiting = self._waiting, []
        return joined[0] if len(joined) == 1 else torch.cat(joined, 2)


class Split:
    """Marks where a band is cut before it goes on."""

    def __init__(self, cut: Cut, channels: int, scale: int) -> None:
        self._cut = cut
        self._channels = channels
        self._scale = scale

    def bands(self, rows: Tensor) -> Sequence[Tensor]:
        """Views of consecutive rows, of nearly equal height."""
        tallest = self._cut.rows(rows.shape[3], self._channels, self._scale)
        return rows.split(split_evenly(rows.shape[2], tallest), dim=2)


def run(chain: Sequence[Stage | Split], rows: Tensor, last: bool = True) -> Iterator[Tensor]:
    """Push ``rows`` through the chain and yield the output rows in order; ``rows`` may be overwritten."""
    for index, stage in enumerate(chain):
        if isinstance(stage, Split):
            yield from _run_each(chain[index + 1 :], stage.bands(rows), last)
            return
        result = stage.push(rows, last)
        if result is None:
            return
        rows = result
    yield rows


def _run_each(chain: Sequence[Stage | Split], bands: Sequence[Tensor], last: bool) -> Iterator[Tensor]:
    for index, band in enumerate(bands):
        yield from run(chain, band, last and index == len(bands) - 1)


def gather(bands: Iterable[Tensor], out: Tensor) -> Tensor:
    """Write consecutive bands to ``out`` [B, C, H, W]."""
    row = 0
    for band in bands:
        out[:, :, row : row + band.shape[2]].copy_(band)
        row += band.shape[2]
    return out
