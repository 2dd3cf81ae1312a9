"""Before and after: known shifts, zooms and colour changes are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from qengine.engine.compare import compare, lab
from qengine.errors import InputError

PHOTO = Path(__file__).parents[1] / "photos" / "astronaut.jpg"


def photo() -> Image.Image:
    with Image.open(PHOTO) as image:
        return image.convert("RGB").resize((256, 192))


def moved(right: float, down: float, zoom: float = 1.0) -> Image.Image:
    """The photo as it looks after being moved and enlarged about its centre."""
    image = photo()
    x, y = image.width / 2, image.height / 2
    inverse = (1 / zoom, 0, x - (x + right) / zoom, 0, 1 / zoom, y - (y + down) / zoom)
    return image.transform(image.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)


def test_a_picture_equals_itself() -> None:
    same = compare(photo(), photo())
    assert same.psnr_db == float("inf") and same.differing_share == 0
    assert same.shift_pixels == (0.0, 0.0) and same.zoom == pytest.approx(1, abs=1e-6)
    assert same.colour_drift == (0.0, 0.0, 0.0) and same.delta_e == 0
    assert set(same.difference.tobytes()) == {127}


@pytest.mark.parametrize("step", [(3, 0), (0, -7), (-2.5, 1.25), (0.4, 0.2)])
def test_a_shift_is_found_to_a_tenth_of_a_pixel(step: tuple[float, float]) -> None:
    found = compare(photo(), moved(*step)).shift_pixels
    assert found == pytest.approx(step, abs=0.1)


def test_a_zoom_is_found_where_the_picture_as_a_whole_stays() -> None:
    found = compare(photo(), moved(0, 0, 1.03))
    assert found.zoom == pytest.approx(1.03, abs=0.005)
    assert np.hypot(*found.shift_pixels) < 1


def test_only_what_the_mask_leaves_black_counts() -> None:
    before = photo()
    after, mask = before.copy(), Image.new("L", before.size, 0)
    ImageDraw.Draw(after).rectangle((60, 40, 160, 140), fill=(255, 0, 0))
    assert compare(before, after).psnr_db < 20
    ImageDraw.Draw(mask).rectangle((60, 40, 160, 140), fill=255)
    found = compare(before, after, mask)
    assert found.psnr_db == float("inf") and found.delta_e == 0
    assert found.unchanged_share == pytest.approx(1 - 101 * 101 / (256 * 192))
    shifted = moved(2, 1)
    ImageDraw.Draw(shifted).rectangle((60, 40, 160, 140), fill=(255, 0, 0))
    assert compare(before, shifted, mask).shift_pixels == pytest.approx((2, 1), abs=0.15)


def test_psnr_and_share_are_those_of_the_formula() -> None:
    before = Image.new("RGB", (20, 10), (100, 100, 100))
    after = before.copy()
    after.paste((104, 100, 100), (0, 0, 10, 10))
    found = compare(before, after)
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 / (16 / 6)))
    assert found.differing_share == 0.5
    assert found.shift_pixels == (0.0, 0.0)


def test_colours_drift_by_the_change_in_cielab() -> None:
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 0): (0, 0, 0)}
    for rgb, expected in known.items():
        assert lab(np.array(rgb, dtype=float)) == pytest.approx(expected, abs=0.02)
    lightness, a, b = compare(photo(), ImageEnhance.Brightness(photo()).enhance(0.8)).colour_drift
    assert lightness < -5 and abs(a) < 3 and abs(b) < 3


def test_another_scale_is_resized_with_a_note_and_another_shape_refused() -> None:
    large = photo().resize((512, 384))
    found = compare(large, photo())
    assert found.notes == ("the first picture was resized from 512x384 to 256x192",)
    with pytest.raises(InputError, match="same shape, got 256x192 and 192x256"):
        compare(photo(), photo().resize((192, 256)))


def test_a_mask_of_another_size_or_all_white_is_refused() -> None:
    with pytest.raises(InputError, match="mask must have the size of the second picture"):
        compare(photo(), photo(), Image.new("L", (10, 10)))
    with pytest.raises(InputError, match="leave at least 1%"):
        compare(photo(), photo(), Image.new("L", photo().size, 255))
