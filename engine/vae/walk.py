"""The stages of `bands` with row counts in place of rows: what each holds and what it needs while it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .cut import Cut, split_evenly

_FLOAT = 4


class Meter:
    """Bytes held between operations, and the most there ever were."""

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize
        self.held = 0
        self.peak = 0
        self._result = 0

    def map(self, channels: int, height: int, width: int) -> int:
        """Bytes of a map in the compute dtype."""
        return channels * height * width * self.itemsize

    def normalising(self, channels: int, height: int, width: int) -> int:
        """Bytes that `Norm.into` takes for a map: lengths, and the map in float32 where it is not."""
        return _FLOAT * height * width * (1 + (channels if self.itemsize < _FLOAT else 0))

    def need(self, *sizes: int) -> None:
        """Note that tensors of these bytes exist beside those held."""
        self.peak = max(self.peak, self.held + sum(sizes))

    def hand_over(self, nbytes: int) -> None:
        """Hold a finished band; whoever gathers the bands lets go of it when the next one comes."""
        self.held += nbytes - self._result
        self._result = nbytes


class Step(Protocol):
    """A stage; its output has ``channels`` and ``width``, its input ``entry`` bytes per row."""

    channels: int
    width: int
    entry: int

    def push(self, rows: int, last: bool) -> int:
        """Take rows; return how many are finished."""
        ...


class _Halo:
    def __init__(self, meter: Meter, channels: int, width: int, normed: bool) -> None:
        self._meter = meter
        self._size = channels, width
        self._row = meter.map(channels, 1, width)
        self._normed = normed
        self._above = 0

    def push(self, rows: int, last: bool) -> int:
        """Return the bytes of the buffer; it holds `finished` + 2 rows."""
        channels, width = self._size
        height = (self._above or 1) + rows + last
        temporary = self._meter.normalising(channels, rows, width) if self._normed else 0
        self._meter.need(height * self._row, max(temporary, 2 * self._row))
        kept = 0 if last else 2
        self._meter.held += (kept - self._above) * self._row
        self._above = kept
        return height


class Conv:
    """See `bands.Conv3x3`."""

    def __init__(self, meter: Meter, inputs: int, channels: int, width: int, *, normed: bool) -> None:
        self._meter = meter
        self._halo = _Halo(meter, inputs, width, normed)
        self.channels = channels
        self.width = width
        self.entry = meter.map(inputs, 1, width)

    def push(self, rows: int, last: bool) -> int:
        """See `Step.push`."""
        height = self._halo.push(rows, last)
        finished = height - 2
        if finished:
            self._meter.need(height * self.entry, self._meter.map(self.channels, finished, self.width))
        return finished


class Residual:
    """See `bands.ResidualRows`."""

    def __init__(self, meter: Meter, inputs: int, channels: int, width: int) -> None:
        self._meter = meter
        self._first = Conv(meter, inputs, channels, width, normed=True)
        self._second = Conv(meter, channels, channels, width, normed=True)
        self._row = meter.map(channels, 1, width)
        self._shortcut_row = self._row if inputs != channels else 0
        self._waiting = 0
        self.channels = channels
        self.width = width
        self.entry = self._first.entry

    def push(self, rows: int, last: bool) -> int:
        """See `Step.push`."""
        meter, row = self._meter, self._row
        finished = between = self._first.push(rows, last)
        if between:
            meter.held += between * row
            finished = self._second.push(between, last)
            meter.held -= between * row
        left = self._waiting + rows - finished
        meter.need(finished * row, rows * self._shortcut_row, 2 * left * row)
        meter.held += (left - self._waiting) * row
        self._waiting = left
        return finished


class Up:
    """See `bands.Upsample`."""

    def __init__(self, meter: Meter, inputs: int, channels: int, width: int) -> None:
        self._meter = meter
        self._halo = _Halo(meter, inputs, width, normed=False)
        self.channels = channels
        self.width = 2 * width
        self.entry = meter.map(inputs, 1, width)

    def push(self, rows: int, last: bool) -> int:
        """See `Step.push`."""
        height = self._halo.push(rows, last)
        finished = 2 * (height - 2)
        if finished:
            phases = self._meter.map(4 * self.channels, height - 1, self.width // 2 + 1)
            out = self._meter.map(self.channels, finished, self.width)
            self._meter.need(phases, max(height * self.entry, out))
        return finished


class Down:
    """See `bands.Downsample`."""

    def __init__(self, meter: Meter, channels: int, width: int) -> None:
        self._meter = meter
        self._row = meter.map(channels, 1, width + 1)
        self._kept = 0
        self.channels = channels
        self.width = width // 2
        self.entry = meter.map(channels, 1, width)

    def push(self, rows: int, last: bool) -> int:
        """See `Step.push`."""
        total = self._kept + rows + last
        finished = max(0, (total - 1) // 2)
        kept = total - 2 * finished
        self._meter.need(total * self._row, kept * self._row)
        self._meter.held += (kept - self._kept) * self._row
        self._kept = kept
        self._meter.need(total * self._row, self._meter.map(self.channels, finished, self.width))
        return finished


class Join:
    """See `bands.Join`."""

    def __init__(self, meter: Meter, cut: Cut, channels: int, width: int, scale: int) -> None:
        self._meter = meter
        self._tall = cut.rows(width, channels, scale)
        self._waiting = 0
        self.channels = channels
        self.width = width
        self.entry = meter.map(channels, 1, width)

    def push(self, rows: int, last: bool) -> int:
        """See `Step.push`."""
        total = self._waiting + rows
        if not last and total < self._tall:
            self._meter.held += rows * self.entry
            self._waiting = total
            return 0
        if self._waiting:
            self._meter.need(total * self.entry)
        self._meter.held -= self._waiting * self.entry
        self._waiting = 0
        return total


@dataclass(frozen=True)
class Split:
    """See `bands.Split`."""

    cut: Cut
    channels: int
    width: int
    scale: int

    def bands(self, rows: int) -> list[int]:
        """Heights of the bands of a map."""
        return split_evenly(rows, self.cut.rows(self.width, self.channels, self.scale))


def walk(meter: Meter, chain: Sequence[Step | Split], rows: int, last: bool, nbytes: int) -> None:
    """Push rows through the chain as `bands.run` does; ``nbytes`` is what they hold, 0 for a view of a taller map."""
    meter.held += nbytes
    for index, stage in enumerate(chain):
        if isinstance(stage, Split):
            heights = stage.bands(rows)
            for number, height in enumerate(heights, 1):
                walk(meter, chain[index + 1 :], height, last and number == len(heights), 0)
            break
        rows = stage.push(rows, last)
        meter.held -= nbytes
        nbytes = meter.map(stage.channels, rows, stage.width)
        meter.held += nbytes
        if not rows:
            return
    else:
        meter.hand_over(nbytes)
    meter.held -= nbytes


def whole(meter: Meter, stage: Step, rows: int) -> None:
    """Push a whole map through one stage."""
    meter.held += rows * stage.entry
    stage.push(rows, True)
    meter.held -= rows * stage.entry
