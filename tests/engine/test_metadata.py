"""Results out: the record in every format, whole files or none."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qengine.engine import metadata
from qengine.engine.metadata import read_metadata, write_latents, write_picture
from qengine.errors import InputError, OutputError
from safetensors.torch import load_file

IMAGE = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
RECORD: dict[str, Any] = {
    "format": 1,
    "qengine": "0.1.0",
    "kind": "edit",
    "model": {"label": "tiny", "variant": "qwen-image-edit-2511", "fingerprint": "ab"},
    "request": {
        "prompt": "make it night, 夜 <b>&",
        "negative_prompt": "blurry",
        "size": [768, 1376],
        "num_inference_steps": 8,
        "true_cfg_scale": 4.0,
        "seed": 42,
        "flow_shift": None,
    },
    "inputs": [{"path": "photo.png", "sha256": "00"}],
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def _text(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        image.load()
        return {str(key): value for key, value in image.info.items()}


def test_E10_the_output_is_a_png_with_the_same_pixels_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    write_picture(path, IMAGE, RECORD)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), np.asarray(IMAGE))
    assert {"parameters", "qengine", "XML:com.adobe.xmp"} <= set(_text(path))


@pytest.mark.parametrize("suffix", PICTURES)
def test_X04_the_record_comes_back_as_it_was_from_every_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_picture(path, IMAGE, RECORD)
    assert read_metadata(path) == RECORD


def test_X04_latents_carry_the_record_too(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    latents = torch.randn(1, 16, 1, 4, 6)
    write_latents(path, latents, RECORD)
    assert torch.equal(load_file(path)["latents"], latents)
    assert read_metadata(path) == RECORD


def test_the_parameters_are_spelled_as_other_tools_read_them(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    write_picture(path, IMAGE, RECORD)
    assert _text(path)["parameters"].splitlines() == [
        "make it night, 夜 <b>&",
        "Negative prompt: blurry",
        "Steps: 8, Sampler: Euler, CFG scale: 4.0, Seed: 42, Size: 768x1376, Model: tiny, Version: qengine 0.1.0",
    ]


@pytest.mark.parametrize(
    ("kind", "term"), [("edit", "compositeWithTrainedAlgorithmicMedia"), ("generate", "trainedAlgorithmicMedia")]
)
@pytest.mark.parametrize("suffix", PICTURES)
def test_the_digital_source_type_says_edit_or_generation(tmp_path: Path, kind: str, term: str, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_picture(path, IMAGE, RECORD | {"kind": kind})
    info = _text(path)
    packet = info["XML:com.adobe.xmp"] if suffix == ".png" else info["xmp"].decode()
    name = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    found = ElementTree.fromstring(packet).findtext(f".//{name}")
    assert found == f"http://cv.iptc.org/newscodes/digitalsourcetype/{term}"


@pytest.mark.parametrize("suffix", PICTURES)
def test_without_a_record_no_text_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_picture(path, IMAGE, None)
    assert not {"parameters", "qengine", "xmp", "exif", "XML:com.adobe.xmp"} & set(_text(path))
    with pytest.raises(InputError, match="record") as caught:
        read_metadata(path)
    assert caught.value.hint


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(max_size=300), negative=st.none() | st.text(max_size=50))
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str | None) -> None:
    record = RECORD | {"request": RECORD["request"] | {"prompt": prompt, "negative_prompt": negative}}
    for suffix in (".png", ".webp"):
        path = tmp_path_factory.getbasetemp() / f"any{suffix}"
        write_picture(path, IMAGE, record)
        assert read_metadata(path) == record


def test_a_prompt_of_20000_characters_fits_a_png_and_is_refused_in_a_jpeg(tmp_path: Path) -> None:
    record = RECORD | {"request": RECORD["request"] | {"prompt": "夜" * 20_000}}
    write_picture(tmp_path / "out.png", IMAGE, record)
    assert read_metadata(tmp_path / "out.png") == record
    with pytest.raises(OutputError, match=r"out\.jpg") as caught:
        write_picture(tmp_path / "out.jpg", IMAGE, record)
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        write_picture(tmp_path / "out.bmp", IMAGE, RECORD)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        write_picture(tmp_path / "file" / "out.png", IMAGE, RECORD)
    assert caught.value.exit_code == 3


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space"):
        write_picture(path, IMAGE, RECORD)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]
    assert path.read_bytes() == b"old"


def test_a_missing_file_is_an_input_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        read_metadata(tmp_path / "no.png")
    assert caught.value.hint


@pytest.mark.parametrize("suffix", [*PICTURES, ".safetensors"])
def test_a_cut_file_is_an_input_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    if suffix == ".safetensors":
        write_latents(path, torch.zeros(1, 4, 1, 2, 2), RECORD)
    else:
        write_picture(path, IMAGE, RECORD)
    for length in (0, 7, 11, 40):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(InputError):
            read_metadata(path)


def _png_with(tmp_path: Path, body: bytes, claimed: int | None = None) -> Path:
    path = tmp_path / "made.png"
    checksum = struct.pack(">I", zlib.crc32(b"iTXt" + body))
    length = struct.pack(">I", len(body) if claimed is None else claimed)
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + length + b"iTXt" + body + checksum + end)
    return path


def test_a_compressed_record_is_read_and_a_text_bomb_is_not_unpacked(tmp_path: Path) -> None:
    head = b"qengine\0\1\0\0\0"
    assert read_metadata(_png_with(tmp_path, head + zlib.compress(b'{"a": 1}'))) == {"a": 1}
    bomb = zlib.compress(b"[" * (metadata.MAX_RECORD_BYTES + 1))
    with pytest.raises(InputError, match="longer"):
        read_metadata(_png_with(tmp_path, head + bomb))


def test_a_record_that_is_no_json_object_is_an_input_error(tmp_path: Path) -> None:
    for text in (b"[1]", b"{", b"[" * 200_000, b"\xff"):
        with pytest.raises(InputError):
            read_metadata(_png_with(tmp_path, b"qengine\0\0\0\0\0" + text))


def test_a_chunk_that_claims_four_gigabytes_is_not_allocated(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        read_metadata(_png_with(tmp_path, b"qengine\0\0\0\0\0{}", claimed=0xFFFFFFFF))


def test_the_json_in_the_file_is_plain_ascii(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    write_picture(path, IMAGE, RECORD)
    text = _text(path)["qengine"]
    assert text.isascii()
    assert json.loads(text) == RECORD
