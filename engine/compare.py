"""Before and after: what changed where nothing was asked, how far the picture moved, how its colours drifted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import InputError
from .picture import resize

Array = NDArray[np.float64]

PEAK = 255.0
ASPECT_SLACK = 0.02
LEAST_SHARE = 0.01
FINE_STEPS = 20
LOW_FREQUENCY = 0.15
"""Cycles per pixel above which resampled pictures say little of where they lie."""

DIFFERENCE_GAIN = 4
_D65 = (0.95047, 1.0, 1.08883)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Comparison:
    """Two pictures of one size, over the pixels that should not have changed.

    Attributes:
        psnr_db: ``10 log10(255^2 / mean squared difference)`` of the 8-bit values; infinite where none differs.
        differing_share: share of those pixels that differ in any channel, 0 to 1.
        shift_pixels: (right, down) by which the second picture is moved, to a twentieth of a pixel.
        zoom: factor by which it is enlarged about its centre, from the shifts of its four quarters; None where they
            cannot be told.
        colour_drift: mean change of (L*, a*, b*) in CIELAB, D65.
        delta_e: mean of the CIE 1976 colour difference.
        unchanged_share: share of the pixels that counted, 1 without a mask.
        difference: grey, ``127 + 4 * difference`` per channel, what should have changed darkened.
        notes: decisions worth telling.
    """

    psnr_db: float
    differing_share: float
    shift_pixels: tuple[float, float]
    zoom: float | None
    colour_drift: tuple[float, float, float]
    delta_e: float
    unchanged_share: float
    difference: Image.Image
    notes: tuple[str, ...] = ()


def compare(before: Image.Image, after: Image.Image, mask: Image.Image | None = None) -> Comparison:
    """Compare an edit with what it was made from.

    Args:
        before: mode RGB; resized to ``after`` where only the scale differs.
        after: mode RGB.
        mask: any mode; white where a change was asked. Those pixels, and any that are not black, do not count.

    Raises:
        InputError: the shapes differ, the mask has another size than ``after``, or it leaves nothing to compare.
    """
    notes = []
    if before.size != after.size:
        _check_aspect(before.size, after.size)
        notes.append(f"the first picture was resized from {_size(before)} to {_size(after)}")
        before = resize(before, *after.size)
    unchanged = _unchanged(mask, after.size)
    first, second = _values(before), _values(after)
    return Comparison(
        psnr_db=_psnr(first, second, unchanged),
        differing_share=float(np.any(first != second, axis=2)[unchanged].mean()),
        shift_pixels=shift(first @ _LUMA, second @ _LUMA, unchanged),
        zoom=_zoom(first @ _LUMA, second @ _LUMA, unchanged),
        **_drift(first, second, unchanged),
        unchanged_share=float(unchanged.mean()),
        difference=_picture(first, second, unchanged),
        notes=tuple(notes),
    )


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _check_aspect(before: tuple[int, int], after: tuple[int, int]) -> None:
    ratio = (before[0] * after[1]) / (before[1] * after[0])
    if abs(ratio - 1) > ASPECT_SLACK:
        raise InputError(
            f"both pictures must have the same shape, got {before[0]}x{before[1]} and {after[0]}x{after[1]}",
            hint="make the edit with --size of the first picture",
        )


def _unchanged(mask: Image.Image | None, size: tuple[int, int]) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones((size[1], size[0]), bool)
    if mask.size != size:
        raise InputError(f"mask must have the size of the second picture, {size[0]}x{size[1]}, got {_size(mask)}")
    unchanged = np.asarray(mask.convert("L")) == 0
    if unchanged.mean() < LEAST_SHARE:
        raise InputError(
            f"mask must leave at least {LEAST_SHARE:.0%} of the picture black to compare, got {unchanged.mean():.1%}",
            hint="white is what was to change",
        )
    return unchanged


def _values(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def _psnr(first: Array, second: Array, unchanged: NDArray[np.bool_]) -> float:
    error = float(np.square(first - second)[unchanged].mean())
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def shift(first: Array, second: Array, unchanged: NDArray[np.bool_]) -> tuple[float, float]:
    """(right, down) in pixels by phase correlation: the peak of the inverse transform of ``F1* F2 / |F1* F2|``.

    Both pictures have their mean taken off and are faded out towards the edges and under the mask. The peak is found
    on whole pixels, then to a twentieth of one on the transform evaluated around it.

    Args:
        first: [height, width].
        second: [height, width].
        unchanged: what may be looked at.
    """
    window = np.outer(np.hanning(first.shape[0] + 2)[1:-1], np.hanning(first.shape[1] + 2)[1:-1]) * unchanged
    weight = window.sum()
    spectra = [np.fft.fft2((values - (values * window).sum() / weight) * window) for values in (first, second)]
    cross = np.conj(spectra[0]) * spectra[1]
    size = np.abs(cross)
    if not size.max() > 0:
        return 0.0, 0.0
    cross = cross / np.maximum(size, size.max() * 1e-9)
    rows, columns = first.shape
    peak = np.unravel_index(np.argmax(np.fft.ifft2(cross).real), cross.shape)
    down, right = (int(at) - n * (int(at) > n // 2) for at, n in zip(peak, (rows, columns), strict=True))
    return _refine(cross, right, down)


def _refine(cross: NDArray[np.complex128], right: int, down: int) -> tuple[float, float]:
    rows, columns = cross.shape
    steps = np.arange(-FINE_STEPS, FINE_STEPS + 1) / FINE_STEPS
    low = [np.exp(-np.square(np.fft.fftfreq(n) / LOW_FREQUENCY)) for n in (rows, columns)]
    cross = cross * np.outer(*low)
    by_row = np.exp(2j * np.pi * np.outer(down + steps, np.fft.fftfreq(rows)))
    by_column = np.exp(2j * np.pi * np.outer(np.fft.fftfreq(columns), right + steps))
    found = (by_row @ cross @ by_column).real
    y, x = np.unravel_index(np.argmax(found), found.shape)
    return float(right + steps[x]) + 0.0, float(down + steps[y]) + 0.0


def _zoom(first: Array, second: Array, unchanged: NDArray[np.bool_]) -> float | None:
    """``1 + sum(shift . place) / sum(place . place)`` over the quarters, their places counted from the centre."""
    rows, columns = (n // 2 for n in first.shape)
    along, length = 0.0, 0.0
    for y in (0, 1):
        for x in (0, 1):
            part = slice(y * rows, (y + 1) * rows), slice(x * columns, (x + 1) * columns)
            if min(rows, columns) < 16 or unchanged[part].mean() < 0.5:
                return None
            right, down = shift(first[part], second[part], unchanged[part])
            place = (x - 0.5) * columns, (y - 0.5) * rows
            along += right * place[0] + down * place[1]
            length += place[0] ** 2 + place[1] ** 2
    return 1 + along / length


def _drift(first: Array, second: Array, unchanged: NDArray[np.bool_]) -> dict:
    change = (lab(second) - lab(first))[unchanged]
    mean = change.mean(axis=0)
    distance = np.sqrt(np.square(change).sum(axis=1)).mean()
    return {"colour_drift": (float(mean[0]), float(mean[1]), float(mean[2])), "delta_e": float(distance)}


def lab(values: Array) -> Array:
    """CIELAB of 8-bit sRGB values: [..., 3] to (L*, a*, b*), white point D65.

    Source: IEC 61966-2-1 (sRGB), CIE 15:2004 (L*a*b*).
    """
    unit = values / PEAK
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _XYZ.T / np.array(_D65)
    delta = 6 / 29
    f = np.where(xyz > delta**3, np.cbrt(xyz), xyz / (3 * delta**2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _picture(first: Array, second: Array, unchanged: NDArray[np.bool_]) -> Image.Image:
    shown = np.clip(127 + DIFFERENCE_GAIN * (second - first), 0, PEAK)
    shown[~unchanged] *= 0.35
    return Image.fromarray(shown.astype(np.uint8), "RGB")
