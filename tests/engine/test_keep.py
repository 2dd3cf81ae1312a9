"""Masks: what is kept of the latents and of the pixels, and which masks are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from qengine.engine.compare import compare
from qengine.engine.job import Geometry
from qengine.engine.keep.keeper import Keeper
from qengine.engine.keep.mask import resolve_mask
from qengine.engine.keep.options import Keep
from qengine.engine.keep.pixels import blend, debug_picture, feather, pixel_mask, token_mask
from qengine.errors import InputError, RequestError

SIGMAS = (1.0, 0.7, 0.4, 0.1, 0.0)
TARGET = Geometry(96, 64, 16)


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def plain(value: int, width: int = 96, height: int = 64) -> Image.Image:
    return Image.new("L", (width, height), value)


def window(box: tuple[int, int, int, int], size: tuple[int, int] = (96, 64)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def tokens(seed: int, target: Geometry = TARGET) -> torch.Tensor:
    rows, columns = target.grid
    return torch.randn(1, rows * columns, 64, generator=torch.Generator().manual_seed(seed))


def keeper(mask: Image.Image | None, target: Geometry = TARGET, **options) -> Keeper:
    size = target.width, target.height
    made = Keeper.of(
        Keep(**({"mask": mask} if mask is not None else {}), **options),
        mask_image=mask,
        control=tokens(1, target),
        noise=tokens(2, target),
        target=target,
        sigmas=SIGMAS,
        original=picture(3, *size),
    )
    assert made is not None
    return made


def run(kept: Keeper | None, target: Geometry = TARGET) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(final latents, mask) of a run whose velocities depend on the latents."""
    x = tokens(2, target)
    for i in range(len(SIGMAS) - 1):
        velocity = torch.tanh(1.7 * x) + tokens(10 + i, target)
        if kept is not None:
            x, _ = kept.before_step(i, x, velocity)
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * velocity
    return (x, None) if kept is None else kept.finish(x)


def test_nothing_asked_is_no_keeper() -> None:
    made = Keeper.of(
        Keep(),
        mask_image=None,
        control=tokens(1),
        noise=tokens(2),
        target=TARGET,
        sigmas=SIGMAS,
        original=picture(3),
    )
    assert made is None


def test_M29_a_white_mask_is_no_mask_to_the_bit() -> None:
    kept = keeper(plain(255))
    latents, last = run(kept)
    assert torch.equal(latents, run(None)[0])
    edited = picture(4)
    assert kept.composite(edited, last).tobytes() == edited.tobytes()


def test_M29_a_black_mask_gives_the_latents_of_the_picture_and_its_pixels() -> None:
    kept = keeper(plain(0))
    latents, last = run(kept)
    assert torch.equal(latents, kept.control)
    assert kept.composite(picture(4), last).tobytes() == kept.original.tobytes()


def test_M29_without_the_final_composite_a_black_mask_only_comes_near() -> None:
    kept = keeper(plain(0), composite="none")
    latents, last = run(kept)
    assert not torch.equal(latents, kept.control)
    assert float((latents - kept.control).abs().max()) <= SIGMAS[-2] * 8
    assert kept.composite(picture(4), last).tobytes() == picture(4).tobytes()


def test_a_mask_acts_at_every_step_with_the_noise_of_its_level() -> None:
    kept = keeper(window((32, 16, 64, 48)))
    x, velocity = tokens(5), tokens(6)
    for index, sigma in enumerate(SIGMAS[:-1]):
        latents, mask = kept.before_step(index, x, velocity)
        assert mask is not None and mask.dtype == torch.float32
        expected = torch.zeros(4, 6)
        expected[1:3, 2:4] = 1
        assert torch.equal(mask, expected)
        inside = expected.bool().reshape(-1)
        noisy = kept.control * (1 - sigma) + kept.noise * sigma
        assert torch.equal(latents[:, inside], x[:, inside])
        assert torch.equal(latents[:, ~inside], noisy[:, ~inside])
        assert torch.equal(x, tokens(5))


def test_kept_tokens_end_exactly_at_the_picture_and_the_others_do_not() -> None:
    kept = keeper(window((32, 16, 64, 48)))
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1:3, 2:4] = True
    same = (run(kept)[0] == kept.control).all(dim=-1).reshape(4, 6)
    assert torch.equal(same, ~inside)


def test_a_thin_stroke_counts_by_its_area_where_bilinear_sampling_misses_it() -> None:
    stroke = window((0, 3, 96, 5))
    assert torch.allclose(token_mask(stroke, TARGET, "area")[0], torch.full((6,), 2 / 16))
    assert not token_mask(stroke, TARGET, "bilinear").any()


def test_bilinear_sampling_is_the_mean_of_the_four_pixels_about_the_middle() -> None:
    mask = Image.fromarray(np.random.default_rng(7).integers(0, 256, (64, 96), dtype=np.uint8))
    values = np.asarray(mask, dtype=np.float64) / 255
    middle = values.reshape(4, 16, 6, 16)[:, 7:9, :, 7:9].mean(axis=(1, 3))
    assert np.allclose(token_mask(mask, TARGET, "bilinear").numpy(), middle, atol=1e-6)


def test_the_edge_of_a_size_that_is_no_multiple_is_repeated_and_not_faded() -> None:
    odd = Geometry(70, 41, 16)
    assert torch.equal(token_mask(plain(255, 70, 41), odd, "area"), torch.ones(3, 5))
    shares = token_mask(window((0, 0, 66, 41), (70, 41)), odd, "area")
    assert torch.equal(shares[:, -1], torch.full((3,), 2 / 16)) and torch.equal(shares[:, :-1], torch.ones(3, 4))
    kept = keeper(window((0, 0, 40, 41), (70, 41)), odd)
    image = np.asarray(kept.composite(picture(4, 70, 41), run(kept, odd)[1]))
    assert np.array_equal(image[:, 40:], np.asarray(kept.original)[:, 40:])


def test_outside_the_mask_every_pixel_is_the_original_and_the_feather_lies_inside() -> None:
    mask = window((20, 10, 80, 60))
    kept = keeper(mask, feather_pixels=8)
    edited = picture(4)
    image = np.asarray(kept.composite(edited, run(kept)[1]))
    outside = np.asarray(mask) == 0
    assert np.array_equal(image[outside], np.asarray(kept.original)[outside])
    assert np.array_equal(image[18:52, 28:72], np.asarray(edited)[18:52, 28:72])
    edge = image[10:18, 40:60]
    assert not np.array_equal(edge, np.asarray(edited)[10:18, 40:60])
    assert not np.array_equal(edge, np.asarray(kept.original)[10:18, 40:60])


def test_a_masked_edit_leaves_the_outside_at_infinite_psnr_and_zero_shift() -> None:
    mask = window((0, 0, 40, 64))
    kept = keeper(mask)
    rolled = Image.fromarray(np.roll(np.asarray(kept.original), 5, axis=1))
    without = compare(kept.original, rolled, mask)
    assert without.psnr_db < 20 and without.shift_pixels[0] != 0
    found = compare(kept.original, kept.composite(rolled, run(kept)[1]), mask)
    assert found.psnr_db == float("inf") and found.differing_share == 0
    assert found.shift_pixels == (0, 0) and found.colour_drift == (0, 0, 0)


@pytest.mark.parametrize("pixels", [0, 1, 8, 40])
def test_the_feather_is_the_distance_to_the_nearest_black_pixel(pixels: int) -> None:
    values = (np.random.default_rng(pixels).random((24, 31)) > 0.02).astype(np.uint8) * 255
    black = np.argwhere(values == 0)
    away = np.sqrt(((np.indices(values.shape)[..., None] - black.T[:, None, None]) ** 2).sum(axis=0)).min(axis=-1)
    expected = np.where(values > 0, np.minimum(away / (pixels + 1), 1), 0)
    assert np.allclose(feather(values, pixels), expected, atol=1e-6)


def test_the_border_of_the_picture_is_no_border_of_the_mask() -> None:
    assert np.array_equal(feather(np.full((9, 12), 255, np.uint8), 5), np.ones((9, 12), np.float32))
    assert not feather(np.zeros((9, 12), np.uint8), 5).any()


def test_soft_values_multiply_the_feather() -> None:
    values = np.full((20, 40), 128, np.uint8)
    values[:, 0] = 0
    weights = feather(values, 4)
    assert np.allclose(weights[:, 1:7], 128 / 255 * np.array([0.2, 0.4, 0.6, 0.8, 1, 1]), atol=1e-6)
    half = blend(Image.new("RGB", (40, 20), "white"), Image.new("RGB", (40, 20), "black"), weights)
    assert np.asarray(half)[0, 20].tolist() == [128, 128, 128]


def test_M34_a_mask_is_drawn_token_by_token() -> None:
    mask = torch.tensor([[0.0, 1.0], [0.25, 0.5]])
    drawn = np.asarray(debug_picture(mask, (30, 32)))
    assert drawn.shape == (32, 30)
    assert [drawn[0, 15], drawn[0, 16], drawn[31, 0], drawn[16, 29]] == [0, 255, 64, 128]
    assert np.array_equal(pixel_mask(mask[:1] > 0, Geometry(30, 15, 16))[:, 14:18], [[0, 0, 255, 255]] * 15)


def test_M35_two_ways_of_telling_what_is_kept_are_refused() -> None:
    with pytest.raises(RequestError, match="told in one way"):
        Keep(mask=plain(255), rcm_threshold=0.1)
    with pytest.raises(RequestError, match="mask_sampling must be one of area, bilinear"):
        Keep(mask=plain(255), mask_sampling="cubic")


@pytest.mark.parametrize("keep", [Keep(mask=plain(255)), Keep(rcm=True), Keep(rcm_threshold=0.1)])
def test_M35_a_picture_of_another_token_grid_is_refused_and_the_way_out_named(keep: Keep) -> None:
    for reference in (Geometry(64, 96, 16), Geometry(112, 64, 16)):
        with pytest.raises(RequestError, match="at the size of the output") as caught:
            resolve_mask(keep, picture_size=(96, 64), target=TARGET, reference=reference)
        assert caught.value.hint == "--resize-control image"
    with pytest.raises(RequestError, match="a picture to keep"):
        resolve_mask(keep, picture_size=None, target=TARGET, reference=None)
    other = Geometry(112, 64, 16)
    with pytest.raises(RequestError, match="4x6 tokens"):
        Keeper.of(
            keep,
            mask_image=plain(255),
            control=tokens(1, other),
            noise=tokens(2),
            target=TARGET,
            sigmas=SIGMAS,
            original=picture(3),
        )


def test_M29_a_mask_of_another_size_and_a_black_one_are_refused() -> None:
    where = {"target": TARGET, "reference": TARGET}
    with pytest.raises(InputError, match="must be 96x64 as the first picture is, got 64x64"):
        resolve_mask(Keep(mask=plain(255, 64, 64)), picture_size=(96, 64), **where)
    with pytest.raises(InputError, match="got black everywhere") as caught:
        resolve_mask(Keep(mask=plain(0)), picture_size=(96, 64), **where)
    assert "white" in str(caught.value.hint)


def test_a_mask_of_the_pictures_size_follows_it_to_the_size_of_the_output() -> None:
    large = window((96, 0, 192, 128), (192, 128))
    found = resolve_mask(Keep(mask=large), picture_size=(192, 128), target=TARGET, reference=TARGET)
    assert found is not None and "resized from 192x128 to 96x64" in found.notes[-1]
    assert np.array_equal(np.asarray(found.image), np.asarray(window((48, 0, 96, 64))))
    same = resolve_mask(Keep(mask=plain(9)), picture_size=(192, 128), target=TARGET, reference=TARGET)
    assert same is not None and same.image.size == (96, 64) and len(same.notes) == 1


def test_a_blur_wider_than_the_latents_is_refused() -> None:
    small = Geometry(32, 48, 16)
    with pytest.raises(RequestError, match="rcm_kernel_size must be below 8"):
        resolve_mask(Keep(rcm_threshold=0.1, rcm_kernel_size=9), picture_size=(32, 48), target=small, reference=small)
    fits = Keep(rcm_threshold=0.1, rcm_kernel_size=7)
    assert resolve_mask(fits, picture_size=(32, 48), target=small, reference=small) is None


def test_a_keeper_depends_on_nothing_but_its_arguments() -> None:
    kept = keeper(window((32, 16, 64, 48)))
    again = replace(kept)
    first = [kept.before_step(i, tokens(i), tokens(9))[0] for i in (0, 1, 2, 3)]
    second = [again.before_step(i, tokens(i), tokens(9))[0] for i in (3, 2, 1, 0)]
    assert all(torch.equal(one, other) for one, other in zip(first, reversed(second), strict=True))
