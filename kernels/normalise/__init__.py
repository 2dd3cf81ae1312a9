"""Moving a matrix of embeddings to other column statistics, and taming the columns that stand out before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch

from ...errors import KernelError

__all__ = [
    "DIRECTIONS",
    "LARGEST",
    "MODES",
    "OUTLIER_MODES",
    "column_stats",
    "mask_and_normalise",
    "mask_outliers",
    "normalise",
    "outlier_ratios",
]

MODES = ("global", "per_dim", "hybrid")
OUTLIER_MODES = ("none", "zero", "clamp", "scale")
DIRECTIONS = ("high", "low", "both")
IMPLEMENTATIONS = ("reference", "triton", "native")
LARGEST = 1e15
"""Values above it have squares whose sums may leave float32."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def column_stats(x: torch.Tensor, *, implementation: str = "reference") -> tuple[torch.Tensor, torch.Tensor]:
    """``mean_d = sum_s x_sd / S`` and ``std_d = sqrt(sum_s (x_sd - mean_d)^2 / (S - 1))``, in float32.

    A constant column has std 0 exactly.

    Args:
        x: [S, D], float32, bfloat16 or float16, any strides; at least two rows.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        mean and std, float32 [D]. On a CUDA device, which is not waited for, a column that is not finite gives NaN.

    Raises:
        KernelError: wrong dtype, shape or implementation; on a CPU also a value that is not finite or above 1e15.
    """
    _check_matrix(x, least_rows=2)
    return _pick(implementation).column_stats(x)


def normalise(
    x: torch.Tensor,
    mode: str = "global",
    *,
    mean: torch.Tensor | None = None,
    std: torch.Tensor | None = None,
    target_std: float = 70.0,
    clip_sigma: float | None = 3.0,
    weight: float = 0.5,
    implementation: str = "reference",
) -> torch.Tensor:
    """Give x the spread of a reference (``global``), or the mean and spread of each of its columns (``per_dim``).

    ``global``: ``x * target_std / std(x)`` over all entries, the mean not taken away; a constant x stays as it is.
    ``per_dim``: ``clamp((x - mean(x)) / max(std(x), 1e-6), +-clip_sigma) * max(std, 1e-6) + mean``, by column.
    ``hybrid``: ``weight * per_dim + (1 - weight) * global``. Every std divides by N - 1.

    Args:
        x: [S, D], float32, bfloat16 or float16, any strides; at least two rows unless the mode is ``global``.
        mode: ``global``, ``per_dim`` or ``hybrid``.
        mean: column means of the reference, float32 [D]; not needed for ``global``.
        std: column standard deviations of the reference, float32 [D]; not needed for ``global``.
        target_std: of the reference over all entries.
        clip_sigma: standard deviations at which ``per_dim`` clamps; None for no clamp.
        weight: share of ``per_dim`` in ``hybrid``, 0 to 1.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        float32 [S, D], a new tensor. On a CUDA device, which is not waited for, a column that is not finite gives NaN,
        in ``global`` and ``hybrid`` everywhere.

    Raises:
        KernelError: wrong dtype, shape, device or option; on a CPU also a value that is not finite or above 1e15.

    Source: fblissjr/llm-dit-experiments@b841723:src/llm_dit/vl/blending.py; there hybrid scales its global part to 61.
    """
    _check_normalise(mode, target_std, clip_sigma, weight)
    _check_matrix(x, least_rows=1 if mode == "global" else 2)
    _check_references(x, mode, mean, std)
    return _pick(implementation).normalise(x, mode, mean, std, target_std, clip_sigma, weight)


def outlier_ratios(
    x: torch.Tensor, std: torch.Tensor, *, direction: str = "high", implementation: str = "reference"
) -> torch.Tensor:
    """How far the spread of each column is from the reference's.

    ``high``: ``std(x) / max(std, 1e-6)``; ``low``: ``std / max(std(x), 1e-6)``; ``both``: the larger of the two.

    Args:
        x: [S, D], float32, bfloat16 or float16, any strides; at least two rows.
        std: column standard deviations of the reference, float32 [D].
        direction: ``high``, ``low`` or ``both``.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        float32 [D]. On a CUDA device, which is not waited for, a column that is not finite gives NaN.

    Raises:
        KernelError: wrong dtype, shape, device or option; on a CPU also a value that is not finite or above 1e15.
    """
    _check_one_of("direction", direction, DIRECTIONS)
    _check_matrix(x, least_rows=2)
    _check_vector("std", std, x, least=0.0)
    return _pick(implementation).outlier_ratios(x, std, direction)


def mask_outliers(
    x: torch.Tensor,
    std: torch.Tensor,
    *,
    threshold: float = 10.0,
    mode: str = "none",
    direction: str = "high",
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tame the columns whose :func:`outlier_ratios` are above the threshold; the others keep their bits.

    ``zero``: 0. ``clamp`` and ``scale``: times ``threshold * std / std(x)`` (``high``) or ``std / (threshold *
    std(x))`` (``low``), so that the ratio becomes the threshold; they differ only where std is below 1e-6, which
    ``scale`` raises to 1e-6. A constant column cannot be scaled up and stays.

    Args:
        x: [S, D], float32, bfloat16 or float16, any strides; at least two rows.
        std: column standard deviations of the reference, float32 [D].
        threshold: above it, not at it, a column is an outlier.
        mode: ``none``, ``zero``, ``clamp`` or ``scale``.
        direction: ``high``, ``low`` or ``both``.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        the masked matrix [S, D], new, in the dtype of x, and the ratios float32 [D] before the mask. On a CUDA device,
        which is not waited for, a column that is not finite stays as it is and its ratio is NaN.

    Raises:
        KernelError: wrong dtype, shape, device or option; on a CPU also a value that is not finite or above 1e15.

    Source: fblissjr/llm-dit-experiments@b841723:src/llm_dit/vl/blending.py; ``low`` and ``both`` are ours.
    """
    _check_mask(threshold, mode, direction)
    _check_matrix(x, least_rows=2)
    _check_vector("std", std, x, least=0.0)
    return _pick(implementation).mask_outliers(x, std, threshold, mode, direction)


def mask_and_normalise(  # noqa: PLR0913 (the options of both steps, by name)
    x: torch.Tensor,
    mean: torch.Tensor | None,
    std: torch.Tensor,
    *,
    threshold: float = 10.0,
    outlier_mode: str = "none",
    direction: str = "high",
    mode: str = "per_dim",
    target_std: float = 70.0,
    clip_sigma: float | None = 3.0,
    weight: float = 0.5,
    implementation: str = "reference",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`mask_outliers`, then :func:`normalise`, with nothing rounded to the dtype of x between them.

    Args:
        x: [S, D], float32, bfloat16 or float16, any strides; at least two rows.
        mean: column means of the reference, float32 [D]; may be None for ``global``.
        std: column standard deviations of the reference, float32 [D].
        threshold: as in :func:`mask_outliers`.
        outlier_mode: mode of :func:`mask_outliers`.
        direction: as in :func:`mask_outliers`.
        mode: mode of :func:`normalise`.
        target_std: as in :func:`normalise`.
        clip_sigma: as in :func:`normalise`.
        weight: as in :func:`normalise`.
        implementation: ``reference``, ``triton`` or ``native``.

    Returns:
        float32 [S, D], new, and the ratios float32 [D] before the mask; what is not finite is as in the two functions.

    Raises:
        KernelError: wrong dtype, shape, device or option; on a CPU also a value that is not finite or above 1e15.
    """
    _check_mask(threshold, outlier_mode, direction)
    _check_normalise(mode, target_std, clip_sigma, weight)
    _check_matrix(x, least_rows=2)
    _check_vector("std", std, x, least=0.0)
    _check_references(x, mode, mean, std)
    run = _pick(implementation).mask_and_normalise
    return run(x, mean, std, threshold, outlier_mode, direction, mode, target_std, clip_sigma, weight)


def _pick(implementation: str) -> ModuleType:
    _check_one_of("implementation", implementation, IMPLEMENTATIONS)
    return import_module(f".{implementation}", __name__)


def _check_matrix(x: torch.Tensor, least_rows: int) -> None:
    if x.dtype not in _FLOATS:
        raise KernelError(f"x must be float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() != 2 or not x.numel():
        raise KernelError(f"x must be a matrix [rows, columns] that is not empty, got shape {list(x.shape)}")
    if len(x) < least_rows:
        raise KernelError(f"x must have at least {least_rows} rows for statistics of its columns, got {len(x)}")
    if x.numel() < 2:
        raise KernelError("x must have at least 2 values for a standard deviation, got 1")
    if x.device.type == "cpu":
        _check_values("x", x, least=-LARGEST)


def _check_vector(subject: str, vector: torch.Tensor, x: torch.Tensor, least: float) -> None:
    if vector.dtype != torch.float32 or vector.shape != x.shape[1:]:
        found = f"{str(vector.dtype).removeprefix('torch.')} {list(vector.shape)}"
        raise KernelError(f"{subject} must be float32 [{x.shape[1]}], one value per column of x, got {found}")
    if vector.device != x.device:
        raise KernelError(f"{subject} must be on {x.device} as x is, got {vector.device}")
    if vector.device.type == "cpu":
        _check_values(subject, vector, least)


def _check_values(subject: str, values: torch.Tensor, least: float) -> None:
    low, high = map(float, values.aminmax())
    if least <= low and high <= LARGEST:
        return
    wide = values.float()
    place = (~((wide >= least) & (wide <= LARGEST))).nonzero()[0].tolist()
    where = f"row {place[0]}, column {place[1]}" if len(place) == 2 else f"column {place[0]}"
    raise KernelError(f"{subject} must be finite, {least:g} to {LARGEST:g}, got {float(values[*place])} in {where}")


def _check_references(x: torch.Tensor, mode: str, mean: torch.Tensor | None, std: torch.Tensor | None) -> None:
    for subject, vector, least in (("mean", mean, -LARGEST), ("std", std, 0.0)):
        if vector is not None:
            _check_vector(subject, vector, x, least)
        elif mode != "global":
            raise KernelError(
                f"{subject} must be the reference's, float32 [{x.shape[1]}], for {mode}, got None",
                hint="give the statistics of the text encoder, or normalise globally",
            )


def _check_normalise(mode: str, target_std: float, clip_sigma: float | None, weight: float) -> None:
    _check_one_of("mode", mode, MODES)
    _check_positive("target_std", target_std)
    if clip_sigma is not None:
        _check_positive("clip_sigma", clip_sigma)
    if not 0 <= weight <= 1:
        raise KernelError(f"weight must be from 0 to 1, got {weight}")


def _check_mask(threshold: float, mode: str, direction: str) -> None:
    _check_positive("threshold", threshold)
    _check_one_of("outlier_mode", mode, OUTLIER_MODES)
    _check_one_of("direction", direction, DIRECTIONS)


def _check_positive(subject: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise KernelError(f"{subject} must be above 0 and finite, got {value}")


def _check_one_of(subject: str, value: str, names: Sequence[str]) -> None:
    if value not in names:
        raise KernelError(f"{subject} must be one of {', '.join(names)}, got {value!r}")
