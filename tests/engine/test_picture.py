"""Pictures in: every kind of file that people hand over, and every kind that must be refused."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from qengine.engine.picture import calculate_dimensions, load_picture, resize, to_picture, to_tensor
from qengine.errors import InputError, RequestError

ORIENTATION = 0x0112


def _same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def _bytes(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_every_listed_format_loads_as_rgb_with_the_hash_of_its_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.bin"
    path.write_bytes(_bytes(_noise(13, 7), kind))
    picture = load_picture(path)
    assert (picture.image.mode, picture.image.size) == ("RGB", (13, 7))
    assert picture.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert picture.label == str(path)
    assert picture.notes == ()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_a_single_pixel_and_a_thin_strip_load(size: tuple[int, int]) -> None:
    assert load_picture(_bytes(_noise(*size))).image.size == size


def test_a_picture_in_memory_gets_a_hash_of_its_pixels() -> None:
    first, same, other = (load_picture(_noise(5, 4, seed)) for seed in (0, 0, 1))
    assert first.sha256 == same.sha256 != other.sha256
    assert first.label == "picture"


def test_a_missing_file_a_folder_and_an_empty_file_are_input_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    for path, said in ((tmp_path / "no.png", "no such file"), (tmp_path, "folder"), (tmp_path / "empty.png", "empty")):
        with pytest.raises(InputError, match=said) as caught:
            load_picture(path)
        assert caught.value.exit_code == 3


def test_a_file_that_is_no_picture_names_the_formats_that_are(tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("hello")
    with pytest.raises(InputError, match="PNG, JPEG"):
        load_picture(path)


def test_a_format_outside_the_list_is_refused() -> None:
    with pytest.raises(InputError, match="PNG, JPEG"):
        load_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_truncated_file_is_an_input_error(kind: str) -> None:
    data = _bytes(_noise(64, 64), kind)
    with pytest.raises(InputError):
        load_picture(data[: len(data) // 2])


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"]), data=st.data())
def test_a_damaged_file_loads_or_is_an_input_error_and_nothing_else(kind: str, data: st.DataObject) -> None:
    content = bytearray(_bytes(_noise(9, 9), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_picture(bytes(content), max_pixels=10_000).image.mode == "RGB"
    except InputError as error:
        assert error.exit_code == 3


@pytest.mark.parametrize("size", [(9000, 9000), (12_000, 12_000), (60_000, 60_000)])
def test_an_image_bomb_is_refused_before_decoding_and_names_the_cap(size: tuple[int, int]) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    with pytest.raises(InputError, match="at most 50000000 pixels"):
        load_picture(_bomb(*size))
    assert Image.MAX_IMAGE_PIXELS == limit
    assert list(warnings.filters) == filters


def test_the_cap_holds_for_pictures_in_memory_and_can_be_set() -> None:
    with pytest.raises(InputError, match="at most 20 pixels"):
        load_picture(_noise(5, 5), max_pixels=20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = _noise(6, 4)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    expected = image.transpose(turned[orientation]) if orientation in turned else image
    loaded = load_picture(_bytes(image, "PNG", exif=exif.tobytes())).image
    assert _same(loaded, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 127)])
    picture = load_picture(_bytes(image.convert(mode)))
    assert _pixels(picture.image)[0, :, 0].tolist() == [255, 0, 128]
    assert "over white" in picture.notes[0]


def test_a_palette_with_a_transparent_entry_is_laid_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putdata([0, 1])
    picture = load_picture(_bytes(image, transparency=0))
    assert _pixels(picture.image)[0].tolist() == [[255, 255, 255], [30, 40, 50]]


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    loaded = load_picture(_bytes(Image.fromarray(values))).image
    assert _pixels(loaded)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(InputError, match="floating point"):
        load_picture(_bytes(Image.new("F", (2, 2)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    assert _pixels(load_picture(image).image).min() >= 254


def test_a_foreign_colour_profile_is_converted_and_said() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    gray = load_picture(_bytes(_noise(4, 4), icc_profile=lab))
    assert "is ignored" in gray.notes[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = srgb.replace("sRGB".encode("utf-16-be"), "qRGB".encode("utf-16-be")).replace(b"sRGB b", b"qRGB b")
    converted = load_picture(_bytes(_noise(4, 4), icc_profile=renamed))
    assert "from qRGB" in converted.notes[0]
    assert np.abs(_pixels(converted.image) - _pixels(_noise(4, 4))).max() <= 1
    assert load_picture(_bytes(_noise(4, 4), icc_profile=srgb)).notes == ()


def test_the_first_frame_of_an_animation_is_used_and_said() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    picture = load_picture(_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert _pixels(picture.image)[0, 0].tolist() == [255, 0, 0]
    assert "first of its 2 frames" in picture.notes[0]


def test_tensors_equal_those_of_the_diffusers_processor_both_ways() -> None:
    image = _noise(21, 17)
    reference = VaeImageProcessor(vae_scale_factor=1)
    ours = to_tensor(image)
    assert torch.equal(ours, reference.preprocess(image))
    assert _same(to_picture(ours), image)
    values = torch.linspace(-1.3, 1.3, 3 * 50).view(1, 3, 5, 10)
    expected: Any = reference.postprocess(values, output_type="pil")
    assert _same(to_picture(values), expected[0])


def test_resizing_equals_that_of_the_diffusers_processor() -> None:
    image = _noise(61, 47)
    expected = VaeImageProcessor(vae_scale_factor=16).resize(image, 32, 96)
    assert _same(resize(image, 96, 32), expected)


def test_not_a_number_becomes_no_picture() -> None:
    with pytest.raises(RequestError, match="finite"):
        to_picture(torch.full((1, 3, 2, 2), float("nan")))


def test_E09_a_portrait_of_1080x1920_is_worked_on_at_768x1376() -> None:
    assert calculate_dimensions(1024 * 1024, 1080 / 1920) == (768, 1376)


@settings(max_examples=200, deadline=None)
@given(area=st.integers(64**2, 2048**2), width=st.integers(200, 4000), height=st.integers(200, 4000))
def test_E09_dimensions_equal_those_of_diffusers_and_are_multiples_of_32(area: int, width: int, height: int) -> None:
    ours = calculate_dimensions(area, width / height)
    assert ours[0] % 32 == ours[1] % 32 == 0
    assert min(ours) >= 32
    theirs = edit.calculate_dimensions(area, width / height)[:2]
    if min(theirs) > 0:
        assert ours == tuple(int(side) for side in theirs)


def test_a_strip_keeps_at_least_one_multiple() -> None:
    assert min(calculate_dimensions(256 * 256, 1 / 5000)) == 32


def test_the_source_image_is_left_as_it_was() -> None:
    image = ImageOps.invert(_noise(4, 4))
    before = image.tobytes()
    load_picture(image)
    assert image.tobytes() == before
