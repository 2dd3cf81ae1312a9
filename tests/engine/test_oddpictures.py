"""Every odd kind of picture file gives the right upright RGB pixels, or the right error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from oddfiles import Odd, all_of_them
from PIL import features
from qengine.engine.picture import load_picture
from qengine.errors import InputError

CASES = all_of_them()


def test_there_are_at_least_60_cases_and_no_two_files_alike() -> None:
    assert len(CASES) >= 60
    assert len({(odd.data, odd.name) for odd in CASES.values()}) == len(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_odd_file_gives_its_pixels_or_its_error(name: str, tmp_path: Path) -> None:
    if name == "avif" and not features.check("avif"):
        pytest.skip("Pillow was built without AVIF")
    odd: Odd = CASES[name]
    path = tmp_path / odd.name
    path.write_bytes(odd.data)
    if odd.pixels is None:
        with pytest.raises(InputError) as caught:
            load_picture(path)
        assert odd.said in caught.value.message and str(path) in caught.value.message
        return
    found = load_picture(path)
    values = np.asarray(found.image).astype(int)
    assert found.image.mode == "RGB" and values.shape == odd.pixels.shape
    assert int(np.abs(values - odd.pixels).max()) <= odd.within
    notes = " ".join(found.notes)
    assert odd.said in notes if odd.said else not found.notes, notes
