"""Sizes of the output and of the references, for every way of asking."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qengine import EditRequest
from qengine.engine.defaults import DEFAULTS
from qengine.engine.job import Geometry
from qengine.engine.resolve import resolve
from qengine.engine.sizes import condition_size, official_size, reference_size, target_size
from qengine.errors import RequestError

AREA = 1024 * 1024
PLUS, EDIT, TINY = (DEFAULTS[name] for name in ("qwen-image-edit-2511", "qwen-image-edit", "tiny"))
SIZES = st.tuples(st.integers(16, 6000), st.integers(16, 6000)).filter(lambda s: max(s) <= 6 * min(s))


@settings(max_examples=100, deadline=None)
@given(picture=SIZES, target=SIZES)
def test_M18_at_the_size_of_the_output_the_token_grids_are_one(picture, target) -> None:
    for defaults in (PLUS, EDIT, TINY):
        size = reference_size(picture, target, "image", defaults)
        assert Geometry(*size, 16).grid == Geometry(*target, 16).grid


@settings(max_examples=300, deadline=None)
@given(picture=SIZES)
def test_M19_the_official_size_is_a_megapixel_within_3_percent_of_the_pictures_shape(picture) -> None:
    width, height = reference_size(picture, (64, 64), "official", PLUS)
    assert abs(width * height / AREA - 1) <= 0.03
    assert width % 16 == height % 16 == 0
    assert abs(width / height / (picture[0] / picture[1]) - 1) <= 16 / min(width, height) + 16 / max(width, height)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((1024, 1024), (1024, 1024)),
        ((1080, 1920), (768, 1376)),
        ((4000, 3000), (1184, 896)),
        ((300, 200), (1248, 832)),
        ((1, 1), (1024, 1024)),
    ],
)
def test_M19_common_shapes_have_multiples_of_32(picture, size) -> None:
    assert official_size(picture, AREA) == size


def test_M19_the_official_area_is_the_models_own() -> None:
    assert reference_size((1080, 1920), (64, 64), "official", TINY) == (192, 336)


@pytest.mark.parametrize("picture", [(640, 480), (1001, 333), (17, 31), (1, 400)])
def test_M20_unresized_a_picture_keeps_its_pixels_and_is_padded_to_whole_tokens(picture) -> None:
    size = reference_size(picture, (64, 64), "none", PLUS)
    assert size == picture
    padded = Geometry(*size, 16).padded
    assert all(0 <= wide - own < 16 and wide % 16 == 0 for wide, own in zip(padded, picture, strict=True))


def test_another_word_is_refused() -> None:
    with pytest.raises(RequestError, match="image, official or none, got 'crop'"):
        reference_size((64, 64), (64, 64), "crop", PLUS)


def test_E09_a_portrait_of_1080x1920_becomes_768x1376_with_no_size_asked() -> None:
    job = resolve(EditRequest(images=(Image.new("RGB", (1080, 1920)),), prompt="x"), PLUS, 16)
    assert (job.target.width, job.target.height) == target_size(None, [(1080, 1920)], PLUS) == (768, 1376)
    assert any("768x1376" in note and "1080x1920" in note for note in job.notes)


@settings(max_examples=50, deadline=None)
@given(size=SIZES, pictures=st.lists(SIZES, min_size=1, max_size=4))
def test_an_asked_size_is_exact_and_else_the_lead_picture_gives_the_shape(size, pictures) -> None:
    assert target_size(size, pictures, PLUS) == size
    for defaults, lead in ((PLUS, pictures[-1]), (EDIT, pictures[0])):
        assert target_size(None, pictures, defaults) == reference_size(lead, size, None, defaults)
    assert target_size(None, [], TINY) == (256, 256)


def test_M04_four_pictures_of_four_sizes_have_their_own_references_in_every_way() -> None:
    pictures = [(640, 480), (480, 640), (1000, 1000), (2000, 500)]
    target = 768, 512
    habit = [reference_size(p, target, None, PLUS) for p in pictures]
    assert habit == [(1184, 896), (896, 1184), (1024, 1024), (2048, 512)]
    assert {reference_size(p, target, "image", PLUS) for p in pictures} == {target}
    assert [reference_size(p, target, "none", PLUS) for p in pictures] == pictures
    images = tuple(Image.new("RGB", size) for size in pictures)
    job = resolve(EditRequest(images=images, prompt="x", size=target), PLUS, 16)
    assert [(g.width, g.height) for g in job.references] == habit
    assert list(job.conditions) == [condition_size(p, PLUS) for p in pictures]


def test_the_vision_tower_sees_the_models_area_whatever_the_vae_sees() -> None:
    assert condition_size((1080, 1920), PLUS) == (288, 512)
    assert condition_size((1080, 1920), EDIT) == (768, 1376)
