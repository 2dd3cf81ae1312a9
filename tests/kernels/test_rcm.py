"""The change mask: the definition, its identities, and Triton bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from qengine.errors import KernelError
from qengine.kernels.rcm import change_mask, reference

from tests.kernels.counting import counted

pytest.importorskip("triton")
from qengine.kernels.rcm import triton as fused  # noqa: E402

IMPLEMENTATIONS = ["reference", "triton"]
SHAPES = [((2, 18, 16), 7), ((1, 5, 2, 4), 3), ((1, 16, 6, 10), 1), ((2, 8, 6), 11)]
"""Latents and the size of the blur; the last reflects as far as a width of 6 allows."""

DILATIONS = [0, 1, 0, 2]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the op allocates is NaN at first."""
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return real(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)


def exact_blur(x: np.ndarray, kernel_size: int) -> np.ndarray:
    """The two-dimensional Gaussian by its definition, float64 [C, h, w]."""
    size = kernel_size if kernel_size % 2 else kernel_size + 1
    if kernel_size <= 1:
        return x
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    bell = np.exp(-0.5 * (np.linspace(-(size - 1) / 2, (size - 1) / 2, size) / sigma) ** 2)
    kernel = np.outer(bell, bell) / np.outer(bell, bell).sum()
    half = size // 2
    wide = np.pad(x, ((0, 0), (half, half), (half, half)), mode="reflect")
    _, height, width = x.shape
    shifted = (kernel[i, j] * wide[:, i : i + height, j : j + width] for i in range(size) for j in range(size))
    return np.sum(list(shifted), axis=0)


def exact_distance(x: torch.Tensor, control: torch.Tensor, kernel_size: int) -> np.ndarray:
    """``mean_c |blur(x) - blur(control)|``: both blurred, as it is defined, in float64."""
    wide = (each.double().numpy().reshape(each.shape[-3:]) for each in (x, control))
    blurred, blurred_control = (exact_blur(each, kernel_size) for each in wide)
    return np.abs(blurred - blurred_control).mean(axis=0)


def exact_mask(distance: np.ndarray, least: float, dilate: int) -> np.ndarray:
    height, width = distance.shape
    tokens = (distance >= least).astype(np.float64).reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
    around = np.zeros_like(tokens)
    for (row, column), _ in np.ndenumerate(tokens):
        around[row, column] = tokens[
            max(0, row - dilate) : row + dilate + 1, max(0, column - dilate) : column + dilate + 1
        ].max()
    return around


def gap(distance: np.ndarray) -> float:
    """A threshold from the widest gap between values in the middle half: no rounding can decide about it."""
    values = np.sort(distance.ravel())
    middle = values[len(values) // 4 : max(3 * len(values) // 4, len(values) // 4 + 2)]
    widest = int(np.diff(middle).argmax())
    assert np.diff(middle)[widest] > 1e-5
    return float(middle[widest : widest + 2].mean())


def pair(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(shape)


def distance_of(implementation: str, x: torch.Tensor, control: torch.Tensor, kernel_size: int) -> torch.Tensor:
    latents = x.reshape(x.shape[-3:]), control.reshape(x.shape[-3:])
    if implementation == "reference":
        return reference.distance(*latents, kernel_size)
    return fused._distance(*latents, kernel_size)[0]


@pytest.mark.parametrize("size", [2, 3, 4, 7, 30, 31])
def test_blur_weights_are_the_gaussian_of_the_next_odd_size(size: int) -> None:
    taps = reference.weights(size)
    assert len(taps) == size | 1 and taps == taps[::-1] and sum(taps) == pytest.approx(1, abs=1e-6)
    one = np.zeros((1, 65, 65))
    one[0, 32, 32] = 1
    across = exact_blur(one, size)[0].sum(axis=0)[32 - len(taps) // 2 : 33 + len(taps) // 2]
    assert np.abs(across - np.array(taps)).max() < 1e-7


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_a_size_of_one_or_less_is_no_blur(size: int) -> None:
    assert reference.weights(size) == (1.0,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "kernel_size"), SHAPES)
def test_distance_is_that_of_float64_within_twice_the_eager_error(
    shape: tuple[int, ...], kernel_size: int, implementation: str
) -> None:
    x, control = pair(shape)
    wanted = exact_distance(x, control, kernel_size)
    found = distance_of(implementation, x, control, kernel_size)
    taps = torch.tensor(reference.weights(kernel_size))
    kernel = torch.outer(taps, taps).expand(shape[-3], 1, -1, -1)
    both = torch.stack([each.reshape(shape[-3:]) for each in (x, control)])
    half = len(taps) // 2
    wide = torch.nn.functional.pad(both, (half,) * 4, mode="reflect")
    blurred = torch.nn.functional.conv2d(wide, kernel, groups=shape[-3])
    eager = (blurred[0] - blurred[1]).abs().mean(dim=0)
    ours, theirs = (np.linalg.norm(each.double().numpy() - wanted) for each in (found, eager))
    assert ours <= max(2 * theirs, 2.0**-24 * np.linalg.norm(wanted))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilate"), [(*case, dilate) for case, dilate in zip(SHAPES, DILATIONS, strict=True)]
)
def test_mask_is_that_of_float64_where_rounding_cannot_decide(
    shape: tuple[int, ...], kernel_size: int, dilate: int, implementation: str
) -> None:
    x, control = pair(shape)
    distance = exact_distance(x, control, kernel_size)
    least = gap(distance)
    options = {"kernel_size": kernel_size, "dilate_size": dilate, "implementation": implementation}
    wanted = exact_mask(distance, least, dilate)
    assert 0 < exact_mask(distance, least, 0).mean() < 1
    absolute = change_mask(x, control, threshold=least, **options)
    assert absolute.dtype == torch.float32 and np.array_equal(absolute.numpy(), wanted)
    relative = change_mask(x, control, threshold=least / float(distance.max()), relative=True, **options)
    assert np.array_equal(relative.numpy(), wanted)


@pytest.mark.parametrize(("shape", "kernel_size"), SHAPES)
def test_triton_gives_the_bits_of_the_definition(shape: tuple[int, ...], kernel_size: int) -> None:
    x, control = pair(shape)
    wanted = distance_of("reference", x, control, kernel_size)
    assert torch.equal(distance_of("triton", x, control, kernel_size), wanted)
    # A threshold that is one of the distances: a difference in the last bit would show.
    least = float(wanted.flatten()[wanted.numel() // 2])
    masks = [
        change_mask(x, control, threshold=least, kernel_size=kernel_size, implementation=name)
        for name in IMPLEMENTATIONS
    ]
    assert torch.equal(*masks)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threshold_nought_changes_everything_and_a_huge_one_nothing(implementation: str) -> None:
    x, control = pair((1, 4, 6, 8))
    x[..., :4] = control[..., :4]
    for relative in (False, True):
        options = {"relative": relative, "implementation": implementation}
        assert torch.equal(change_mask(x, control, threshold=0.0, **options), torch.ones(3, 4))
        assert torch.equal(change_mask(x, control, threshold=1e6, **options), torch.zeros(3, 4))
    assert torch.equal(change_mask(x, x, threshold=0.5, relative=True, implementation=implementation), torch.ones(3, 4))
    assert not change_mask(x, x, threshold=1e-30, implementation=implementation).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_relative_threshold_of_one_leaves_the_largest_pixel(implementation: str) -> None:
    x, control = pair((2, 8, 10))
    x[:, 5, 4] += 100
    mask = change_mask(x, control, threshold=1, relative=True, kernel_size=1, implementation=implementation)
    assert mask[2, 2] == 0.25 and int(mask.count_nonzero()) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_higher_threshold_never_enlarges_the_mask(implementation: str) -> None:
    x, control = pair((3, 8, 10))
    masks = [change_mask(x, control, threshold=t, implementation=implementation) for t in (0.2, 0.4, 0.6, 0.9)]
    assert all(bool((low >= high).all()) for low, high in zip(masks, masks[1:], strict=False))
    assert masks[0].mean() > masks[-1].mean()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_even_blur_is_the_next_odd_one(implementation: str) -> None:
    x, control = pair((3, 8, 10))
    least = gap(exact_distance(x, control, 5))
    masks = {
        size: change_mask(x, control, threshold=least, kernel_size=size, implementation=implementation)
        for size in (1, 3, 4, 5)
    }
    assert torch.equal(masks[4], masks[5]) and not torch.equal(masks[3], masks[5])
    assert not torch.equal(masks[1], masks[3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dilate", [0, 2])
def test_one_token_grows_to_a_square_and_a_corner_is_cut_off(dilate: int, implementation: str) -> None:
    control = torch.zeros(1, 18, 22)
    x = control.clone()
    x[:, 8:10, 10:12] = 1
    options = {"threshold": 0.5, "kernel_size": 1, "dilate_size": dilate, "implementation": implementation}
    wanted = torch.zeros(9, 11)
    wanted[4 - dilate : 5 + dilate, 5 - dilate : 6 + dilate] = 1
    assert torch.equal(change_mask(x, control, **options), wanted)
    corner = control.clone()
    corner[:, 0, 0] = 1
    wanted = torch.zeros(9, 11)
    wanted[: dilate + 1, : dilate + 1] = 0.25
    assert torch.equal(change_mask(corner, control, **options), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_change_no_bit_and_inputs_stay(implementation: str) -> None:
    x, control = torch.randn(8, 3, 20)[..., ::2].transpose(0, 1), torch.randn(10, 8, 3).permute(2, 1, 0)
    before = x.clone(), control.clone()
    options = {"threshold": 0.6, "relative": True, "kernel_size": 5, "implementation": implementation}
    found = change_mask(x, control, **options)
    assert torch.equal(found, change_mask(x.contiguous(), control.contiguous(), **options))
    assert torch.equal(found, change_mask(x[None], control[None], **options))
    assert torch.equal(x, before[0]) and torch.equal(control, before[1])


def test_triton_launches_three_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [counted(monkeypatch, fused, name) for name in ("_across", "_down", "_tokens")]
    x, control = pair((2, 4, 6))
    change_mask(x, control, threshold=0.5, relative=True, dilate_size=1, implementation="triton")
    assert [kernel.launches for kernel in kernels] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("implementation", [reference, fused])
def test_what_is_not_finite_stays_visible_where_no_one_waits_for_the_device(implementation: Any) -> None:
    for value in (float("nan"), float("inf")):
        x, control = pair((2, 12, 12))
        x[1, 6, 6] = value
        with np.errstate(invalid="ignore"):
            found = implementation.change_mask(x, control, 0.5, False, 3, 1)
            wanted = torch.zeros(6, 6, dtype=torch.bool)
            wanted[1:5, 1:5] = True
            assert torch.equal(found.isnan(), wanted)
            assert implementation.change_mask(x, control, 0.5, True, 1, 0).isnan().all()


GOOD = torch.ones(2, 4, 6)
NAN = GOOD.clone()
NAN[1, 2, 3] = float("nan")
BAD = [
    (lambda: change_mask(GOOD.double(), GOOD, threshold=1), "x must be float32, got float64"),
    (lambda: change_mask(GOOD, GOOD.bfloat16(), threshold=1), "control must be float32, got bfloat16"),
    (lambda: change_mask(GOOD[0], GOOD[0], threshold=1), r"x must be latents .* got shape \[4, 6\]"),
    (lambda: change_mask(GOOD.expand(2, 2, 4, 6), GOOD, threshold=1), r"x must be latents .* got shape \[2, 2, 4, 6\]"),
    (lambda: change_mask(GOOD[:0], GOOD[:0], threshold=1), r"not empty, got shape \[0, 4, 6\]"),
    (lambda: change_mask(GOOD[:, :3], GOOD[:, :3], threshold=1), r"even height and width, got shape \[2, 3, 6\]"),
    (lambda: change_mask(GOOD, GOOD[:, :, :4], threshold=1), r"control must be \[2, 4, 6\] on cpu .* got \[2, 4, 4\]"),
    (lambda: change_mask(GOOD, GOOD[None], threshold=1), r"control must be \[2, 4, 6\] .* got \[1, 2, 4, 6\]"),
    (lambda: change_mask(GOOD, GOOD.to("meta"), threshold=1), r"control must be .* on cpu .* on meta"),
    (lambda: change_mask(NAN, GOOD, threshold=1), r"x must be finite, got nan at \[1, 2, 3\]"),
    (lambda: change_mask(GOOD, GOOD / 0, threshold=1), r"control must be finite, got inf at \[0, 0, 0\]"),
    (lambda: change_mask(GOOD, GOOD, threshold=-0.1), "threshold must be at least 0 and finite, got -0.1"),
    (lambda: change_mask(GOOD, GOOD, threshold=float("nan")), "threshold must be .* got nan"),
    (lambda: change_mask(GOOD, GOOD, threshold=1, dilate_size=-1), "dilate_size must be at least 0, got -1"),
    (lambda: change_mask(GOOD, GOOD, threshold=1, kernel_size=8), "kernel_size must be below 8 .* got 8"),
    (lambda: change_mask(GOOD, GOOD, threshold=1, implementation="cuda"), "implementation must be one of .* 'cuda'"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        call()


def test_triton_without_its_interpreter_refuses_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.triton, "JITFunction", type(fused._across))
    with pytest.raises(KernelError, match="x must be on a CUDA device for triton, got cpu"):
        change_mask(GOOD, GOOD, threshold=1.0, implementation="triton")
