"""The region change mask: musubi-tuner's rule to the bit, and ours on changes that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from qengine.engine.job import Geometry
from qengine.engine.keep.keeper import Keeper
from qengine.engine.keep.options import Keep
from qengine.engine.keep.rules import musubi_mask
from qengine.engine.latents import pack, unpack
from qengine.kernels.rcm import change_mask

TARGET = Geometry(192, 128, 16)
ROWS, COLUMNS = TARGET.grid
SIGMAS = (1.0, 0.8, 0.55, 0.3, 0.02, 0.0)


def planes(seed: int) -> torch.Tensor:
    return torch.randn(1, 16, 1, 2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(seed))


CONTROL, NOISE = pack(planes(1)), pack(planes(2))


def keeper(**options) -> Keeper:
    made = Keeper.of(
        Keep(**options),
        mask_image=None,
        control=CONTROL,
        noise=NOISE,
        target=TARGET,
        sigmas=SIGMAS,
        original=Image.new("RGB", (192, 128), (9, 99, 199)),
    )
    assert made is not None
    return made


def plainly(latents, control, noise, sigma, threshold, relative, size, dilate):
    """The rule as its authors wrote it down, in float32: (packed latents, mask by token)."""
    noisy = control * (1 - sigma) + noise * sigma
    pair = [unpack(value, ROWS, COLUMNS)[0, :, 0] for value in (latents, noisy)]
    if size > 1:
        half = (size | 1) // 2
        deviation = 0.3 * (((size | 1) - 1) * 0.5 - 1) + 0.8
        line = torch.exp(-0.5 * (torch.linspace(-half, half, size | 1) / deviation).pow(2))
        line = line / line.sum()
        for at, value in enumerate(pair):
            wide = F.pad(value, (half, half, half, half), mode="reflect")
            moved = wide.unfold(1, 2 * half + 1, 1).unfold(2, 2 * half + 1, 1)
            blurred = torch.zeros_like(value)
            for y, x in np.ndindex(2 * half + 1, 2 * half + 1):
                blurred += moved[..., y, x] * (line[y] * line[x])
            pair[at] = blurred
    mean = (pair[0] - pair[1]).abs().mean(dim=0, keepdim=True)
    least = threshold * mean.max().item() if relative else threshold
    mask = F.interpolate((mean >= least).float()[None], (ROWS, COLUMNS), mode="bilinear", align_corners=False)
    if dilate:
        mask = F.max_pool2d(mask, dilate * 2 + 1, stride=1, padding=dilate)
    share = mask.reshape(1, -1, 1)
    return latents * share + noisy * (1.0 - share), mask[0, 0]


@pytest.mark.parametrize(
    ("threshold", "relative", "size", "dilate"),
    [(0.6, False, 3, 0), (0.5, True, 3, 1), (1.1, False, 1, 0), (0.35, False, 4, 2), (0.6, True, 7, 0)],
)
def test_M36_each_step_equals_the_rule_as_it_was_written_down(threshold, relative, size, dilate) -> None:
    name = "rcm_relative_threshold" if relative else "rcm_threshold"
    kept = keeper(**{name: threshold}, rcm_kernel_size=size, rcm_dilate_size=dilate)
    uneven = torch.linspace(0, 4, ROWS * COLUMNS)[:, None]
    x = y = NOISE
    partly = False
    for i in range(len(SIGMAS) - 1):
        velocity = NOISE - CONTROL + uneven * (torch.tanh(1.3 * x) + pack(planes(10 + i)))
        x, mask = kept.before_step(i, x, velocity)
        if i:
            y, wanted = plainly(y, CONTROL, NOISE, SIGMAS[i], threshold, relative, size, dilate)
            assert mask is not None and torch.equal(mask, wanted)
            partly = partly or 0 < float(mask.mean()) < 1
        else:
            assert mask is None
        assert torch.equal(x, y)
        x, y = (z + (SIGMAS[i + 1] - SIGMAS[i]) * velocity for z in (x, y))
    assert partly
    assert torch.equal(kept.finish(x)[0], x) and kept.finish(x)[1] is None


def test_the_blur_is_the_convolution_with_the_outer_product_of_its_taps() -> None:
    x, control = (unpack(value, ROWS, COLUMNS)[0, :, 0] for value in (NOISE, CONTROL))
    line = torch.exp(-0.5 * (torch.linspace(-2, 2, 5) / 1.1).pow(2))
    taps = torch.outer(line / line.sum(), line / line.sum())[None, None].expand(16, 1, 5, 5)
    blurred = [F.conv2d(F.pad(v[None], (2, 2, 2, 2), mode="reflect"), taps, groups=16)[0] for v in (x, control)]
    wanted = F.avg_pool2d(((blurred[0] - blurred[1]).abs().mean(dim=0) >= 0.5).float()[None], 2)[0]
    assert torch.equal(musubi_mask(x, control, 0.5, False, 5, 0), wanted)
    assert torch.equal(change_mask(x, control, threshold=0.5, kernel_size=5), wanted)


def masks(x: torch.Tensor, index: int = 2, **options) -> torch.Tensor:
    mask = keeper(**options).before_step(index, x, torch.zeros_like(x))[1]
    assert mask is not None
    return mask


def test_M30_nought_changes_everything_a_huge_threshold_nothing_and_the_area_falls_between() -> None:
    x = pack(planes(5))
    areas = [float(masks(x, rcm_threshold=t).mean()) for t in (0.0, 0.4, 0.46, 0.52, 1e6)]
    assert areas[0] == 1 and areas[-1] == 0
    assert areas == sorted(areas, reverse=True) and len(set(areas)) == 5
    kept = keeper(rcm_threshold=1e6)
    noisy = CONTROL * (1 - SIGMAS[2]) + NOISE * SIGMAS[2]
    assert torch.equal(kept.before_step(2, x, x)[0], noisy)
    assert torch.equal(keeper(rcm_threshold=0.0).before_step(2, x, x)[0], x)


def test_M31_a_relative_threshold_is_a_share_of_the_largest_difference() -> None:
    x = pack(planes(5))
    noisy = CONTROL * (1 - SIGMAS[2]) + NOISE * SIGMAS[2]
    difference = unpack(x - noisy, ROWS, COLUMNS)[0, :, 0].abs().mean(dim=0)
    largest = float(difference.max())
    relative = masks(x, rcm_relative_threshold=0.6, rcm_kernel_size=1)
    assert torch.equal(relative, masks(x, rcm_threshold=0.6 * largest, rcm_kernel_size=1))
    assert not torch.equal(relative, masks(x, rcm_threshold=0.6, rcm_kernel_size=1))
    assert int(masks(x, rcm_relative_threshold=1.0, rcm_kernel_size=1).count_nonzero()) == 1


def test_M32_one_is_no_blur_and_an_even_size_the_next_odd_one() -> None:
    noisy = CONTROL * (1 - SIGMAS[2]) + NOISE * SIGMAS[2]
    x = unpack(noisy, ROWS, COLUMNS).clone()
    x[0, :, 0, 6, 9] += 3
    x = pack(x)
    single = {k: masks(x, rcm_threshold=0.2, rcm_kernel_size=k) for k in (0, 1, 3, 4, 5)}
    assert int(single[1].count_nonzero()) == 1 and float(single[1][3, 4]) == 0.25
    assert torch.equal(single[0], single[1]) and torch.equal(single[4], single[5])
    assert float(single[3].sum()) > float(single[1].sum())


@pytest.mark.parametrize("dilate", [0, 1, 2])
def test_M33_one_token_grows_to_a_square(dilate: int) -> None:
    noisy = CONTROL * (1 - SIGMAS[2]) + NOISE * SIGMAS[2]
    x = noisy.clone()
    x[0, 4 * COLUMNS + 6] += 2
    mask = masks(x, rcm_threshold=0.5, rcm_kernel_size=1, rcm_dilate_size=dilate)
    expected = torch.zeros(ROWS, COLUMNS)
    expected[4 - dilate : 5 + dilate, 6 - dilate : 7 + dilate] = 1
    assert torch.equal(mask, expected)


def test_M34_there_is_a_mask_for_each_step_from_step_1() -> None:
    x = pack(planes(5))
    for options in ({"rcm": True}, {"rcm_threshold": 0.5}):
        kept = keeper(**options)
        latents, none = kept.before_step(0, NOISE, x)
        assert none is None and latents is NOISE
        for index in range(1, len(SIGMAS) - 1):
            _, mask = kept.before_step(index, x, x)
            assert mask is not None and mask.shape == (ROWS, COLUMNS) and mask.dtype == torch.float32


def edited(amount: float, rough: float = 0.0, seed: int = 7) -> torch.Tensor:
    """The control with a block of tokens, rows 2 to 4 and columns 3 to 6, changed, and an error everywhere."""
    change = torch.zeros(ROWS, COLUMNS, 64)
    change[2:5, 3:7] = amount * pack(planes(seed)).reshape(ROWS, COLUMNS, 64)[2:5, 3:7].sign()
    return CONTROL + change.reshape(1, -1, 64) + rough * pack(planes(seed + 1))


def steps_to(clean: torch.Tensor, kept: Keeper, error: float = 0.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A run of a network that predicts ``clean``, wrong by ``error * sigma``, and the masks of its steps and end."""
    x, found = NOISE, []
    for i, sigma in enumerate(SIGMAS[:-1]):
        velocity = (x - clean - error * sigma * pack(planes(20 + i))) / sigma
        x, mask = kept.before_step(i, x, velocity)
        found += [] if mask is None else [mask]
        x = x + (SIGMAS[i + 1] - sigma) * velocity
    latents, last = kept.finish(x)
    return latents, [*found, *([] if last is None else [last])]


def test_our_rule_finds_the_block_at_every_noise_level_and_does_not_flicker() -> None:
    kept = keeper(rcm=True)
    latents, found = steps_to(edited(1.5, rough=0.05), kept, error=0.1)
    block = torch.zeros(ROWS, COLUMNS)
    block[1:6, 2:8] = 1
    grown = F.max_pool2d(block[None], 3, stride=1, padding=1)[0]
    assert len(found) == len(SIGMAS) - 1
    for mask in found:
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        assert bool((mask[2:5, 3:7] == 1).all()) and bool((mask <= grown).all())
        assert torch.equal(mask, found[0])
    same = (latents == CONTROL).all(dim=-1).reshape(ROWS, COLUMNS)
    assert torch.equal(same, found[-1] == 0)


def test_our_rule_keeps_all_where_nothing_changes_and_nothing_where_all_does() -> None:
    kept = keeper(rcm=True)
    latents, found = steps_to(CONTROL + 0.05 * pack(planes(3)), kept)
    assert torch.equal(latents, CONTROL) and not any(bool(mask.any()) for mask in found)
    decoded = Image.new("RGB", (192, 128), "red")
    assert kept.composite(decoded, found[-1]).tobytes() == kept.original.tobytes()
    latents, found = steps_to(pack(planes(4)), kept)
    assert all(bool(mask.all()) for mask in found)
    assert kept.composite(decoded, found[-1]).tobytes() == decoded.tobytes()


def test_a_higher_sensitivity_never_shrinks_the_region() -> None:
    x = edited(0.7, rough=0.12)
    found = [keeper(rcm=True, rcm_sensitivity=s).finish(x)[1] for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    regions = [mask for mask in found if mask is not None]
    assert len(regions) == 5 and not regions[0].any() and regions[-1].all()
    assert all(bool((low <= high).all()) for low, high in zip(regions, regions[1:], strict=False))


def test_a_change_that_was_set_back_is_found_again_in_the_next_step() -> None:
    kept = keeper(rcm=True)
    clean = edited(1.5)
    sigma, after = SIGMAS[1], SIGMAS[2]
    start = CONTROL * (1 - sigma) + NOISE * sigma
    velocity = (start - clean) / sigma
    assert bool(kept.before_step(1, start, velocity)[1].any())  # type: ignore[union-attr]
    reset = CONTROL * (1 - after) + NOISE * after
    mask = kept.before_step(2, reset, (reset - clean) / after)[1]
    assert mask is not None and bool(mask[2:5, 3:7].all())


def test_a_weak_edge_counts_where_it_touches_a_strong_change_and_a_weak_spot_does_not() -> None:
    x = CONTROL.reshape(1, ROWS, COLUMNS, 64).clone()
    x[:, 3, 2:5] += 1.0
    x[:, 3, 5:7] += 0.16
    x[:, 6, 10] += 0.16
    kept = keeper(rcm=True, rcm_kernel_size=1)
    changed = kept.finish(x.reshape(1, -1, 64))[0].ne(CONTROL).any(dim=-1).reshape(ROWS, COLUMNS)
    assert bool(changed[3, 2:7].all()) and not bool(changed[6, 10])


def test_the_pixels_of_kept_tokens_are_the_originals() -> None:
    kept = keeper(rcm=True, feather_pixels=6)
    _, found = steps_to(edited(1.5), kept)
    decoded = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192, 3), dtype=np.uint8))
    image = np.asarray(kept.composite(decoded, found[-1]))
    inside = np.kron(found[-1].numpy(), np.ones((16, 16))) > 0
    assert np.array_equal(image[~inside], np.asarray(kept.original)[~inside])
    middle = np.s_[2 * 16 : 5 * 16, 3 * 16 : 7 * 16]
    assert np.array_equal(image[middle], np.asarray(decoded)[middle])


def test_a_velocity_that_is_not_finite_is_left_to_the_step_that_checks_it() -> None:
    broken = torch.full_like(NOISE, math.nan)
    _, mask = keeper(rcm=True).before_step(1, NOISE, broken)
    assert mask is not None and bool(mask.isfinite().all())


@pytest.mark.parametrize("options", [{"rcm": True}, {"rcm_threshold": 0.3}, {"rcm_relative_threshold": 0.5}])
def test_a_resumed_run_finds_the_same_masks(options: dict) -> None:
    def go(first: int, x: torch.Tensor, kept: Keeper) -> list[torch.Tensor]:
        states = []
        for i in range(first, len(SIGMAS) - 1):
            velocity = (x - edited(1.0)) / SIGMAS[i]
            x = kept.before_step(i, x, velocity)[0] + (SIGMAS[i + 1] - SIGMAS[i]) * velocity
            states.append(x)
        return [*states, kept.finish(x)[0]]

    whole = go(0, NOISE, keeper(**options))
    rest = go(3, whole[2], keeper(**options))
    assert all(torch.equal(one, other) for one, other in zip(whole[3:], rest, strict=True))
