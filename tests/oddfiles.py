"""Picture files of every odd kind, made here, each with the pixels or the error that it must give."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

TO_XYZ_D50 = {
    "srgb": np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]),
    "wide": np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]),
}
ORIENTED: Mapping[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}


@dataclass(frozen=True)
class Odd:
    """A file and what reading it must give.

    Attributes:
        data: the bytes.
        pixels: RGB [height, width, 3], or None where it must be refused.
        within: largest difference of a value, for formats that lose some.
        said: part of the notes, or of the error.
        name: of the file.
    """

    data: bytes
    pixels: Pixels | None = None
    within: int = 0
    said: str = ""
    name: str = "picture.png"


def blocks(width: int = 48, height: int = 32) -> Pixels:
    """Flat blocks of 16 x 16, no two alike, so that lossy formats stay near and any turn is seen."""
    rows, columns = -(-height // 16), -(-width // 16)
    values = np.random.default_rng(5).integers(40, 216, (rows, columns, 3), dtype=np.uint8)
    return values.repeat(16, 0).repeat(16, 1)[:height, :width]


def gray(pixels: Pixels) -> Pixels:
    """The middle channel as all three."""
    return pixels[..., 1:2].repeat(3, axis=2)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG from its filtered rows; colour 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGB and alpha."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(values: NDArray[np.uint16], colour: int) -> bytes:
    """16 bits a channel, [height, width, channels]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, colour, rows)


def profile(space: str, gamma: float, name: str = "made here") -> bytes:
    """An ICC version 2 display profile: primaries of ``space`` ("gray" for none), one gamma."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    words = name.encode()
    described = b"desc\0\0\0\0" + struct.pack(">I", len(words) + 1) + words + b"\0" + b"\0" * 78
    tags = {b"desc": described, b"wtpt": _xyz(np.array([0.9642, 1.0, 0.8249])), b"cprt": b"text\0\0\0\0none\0"}
    if space == "gray":
        tags[b"kTRC"] = curve
    else:
        for at, letter in enumerate((b"r", b"g", b"b")):
            tags[letter + b"XYZ"] = _xyz(TO_XYZ_D50[space][:, at])
            tags[letter + b"TRC"] = curve
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    kind = b"GRAY" if space == "gray" else b"RGB "
    white = struct.pack(">iii", *(round(value * 65536) for value in (0.9642, 1.0, 0.8249)))
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"\0\0\0\0", 0x02400000, b"mntr", kind, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(float(value) * 65536) for value in values))


def in_srgb(pixels: Pixels, space: str, gamma: float) -> Pixels:
    """What values of that profile are in sRGB, computed in float64."""
    linear = (pixels / 255.0) ** gamma
    if space != "gray":
        linear = linear @ TO_XYZ_D50[space].T @ np.linalg.inv(TO_XYZ_D50["srgb"]).T
    linear = np.clip(linear, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(encoded * 255).astype(np.uint8)


def over_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[..., None] / 255.0
    return np.round(pixels * share + 255 * (1 - share)).astype(np.uint8)


def fading(width: int = 48, height: int = 32) -> Pixels:
    """An alpha channel from clear to opaque."""
    return np.linspace(0, 255, width).round().astype(np.uint8)[None].repeat(height, axis=0)


RGB = blocks()
GRAY = gray(RGB)
IMAGE = Image.fromarray(RGB)
LUMA = Image.fromarray(RGB[..., 1].copy())


def with_alpha() -> Image.Image:
    return Image.fromarray(np.dstack([RGB, fading()]))


def oriented() -> dict[str, Odd]:
    found = {
        f"jpeg turned {n}": Odd(
            saved(IMAGE, "JPEG", quality=95, subsampling=0, exif=exif(n)), turn(RGB), within=6, name=f"{n}.jpg"
        )
        for n, turn in ORIENTED.items()
    }
    found["png turned 6"] = Odd(saved(IMAGE, exif=exif(6)), ORIENTED[6](RGB))
    found["webp turned 8"] = Odd(saved(IMAGE, "WEBP", lossless=True, exif=exif(8)), ORIENTED[8](RGB))
    found["tiff turned 3"] = Odd(saved(IMAGE, "TIFF", tiffinfo={0x0112: 3}), ORIENTED[3](RGB))
    found["jpeg turned by an unknown number"] = Odd(
        saved(IMAGE, "JPEG", quality=95, subsampling=0, exif=exif(9)), RGB, within=6
    )
    found["jpeg with broken EXIF"] = Odd(
        saved(IMAGE, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0MM\0*garbage"), RGB, 6, "Corrupt EXIF"
    )
    return found


def coloured() -> dict[str, Odd]:
    linear, wide = profile("srgb", 1.0), profile("wide", 2.2)
    said = "converted from made here"
    cmyk = IMAGE.convert("CMYK")
    naive = np.asarray(cmyk.convert("RGB"))
    return {
        "linear profile": Odd(saved(IMAGE, icc_profile=linear), in_srgb(RGB, "srgb", 1.0), 2, said),
        "wide profile": Odd(saved(IMAGE, icc_profile=wide), in_srgb(RGB, "wide", 2.2), 2, said),
        "wide profile jpeg": Odd(
            saved(IMAGE, "JPEG", quality=98, subsampling=0, icc_profile=wide), in_srgb(RGB, "wide", 2.2), 6, said
        ),
        "wide profile and turned": Odd(
            saved(IMAGE, icc_profile=wide, exif=exif(6)), ORIENTED[6](in_srgb(RGB, "wide", 2.2)), 2, said
        ),
        "wide profile and alpha": Odd(
            saved(with_alpha(), icc_profile=wide), over_white(in_srgb(RGB, "wide", 2.2), fading()), 3, said
        ),
        "gray profile": Odd(saved(LUMA, icc_profile=profile("gray", 1.0)), in_srgb(GRAY, "gray", 1.0), 2, said),
        "sRGB by name": Odd(saved(IMAGE, icc_profile=profile("srgb", 2.2, "sRGB of some kind")), RGB),
        "profile of another kind of image": Odd(saved(LUMA, icc_profile=wide), GRAY, said="is ignored"),
        "broken profile": Odd(saved(IMAGE, icc_profile=b"no profile at all" * 20), RGB, said="is ignored"),
        "cmyk jpeg": Odd(saved(cmyk, "JPEG", quality=98, subsampling=0), naive, within=8),
        "cmyk tiff": Odd(saved(cmyk, "TIFF"), naive),
        "gray jpeg": Odd(saved(LUMA, "JPEG", quality=98), GRAY, within=4),
        "lab tiff": Odd(saved(lab(), "TIFF"), lab_in_srgb(), within=3),
    }


def lab() -> Image.Image:
    return Image.frombytes("LAB", (16, 16), bytes([150, 20, 236]) * 256)


def lab_in_srgb() -> Pixels:
    """L* = 150 / 2.55, a* = 20, b* = -20 against D50, in sRGB."""
    f = (150 / 2.55 + 16) / 116
    spread = np.array([f + 20 / 500, f, f + 20 / 200])
    xyz = np.where(spread > 6 / 29, spread**3, 3 * (6 / 29) ** 2 * (spread - 4 / 29)) * [0.9642, 1.0, 0.8249]
    linear = xyz @ np.linalg.inv(TO_XYZ_D50["srgb"]).T
    value = np.round(255 * (1.055 * linear ** (1 / 2.4) - 0.055)).astype(np.uint8)
    return np.broadcast_to(value, (16, 16, 3)).copy()


def transparent() -> dict[str, Odd]:
    said = "over white"
    alpha = fading()
    half = np.zeros((32, 48), np.uint8)
    half[:, 24:] = 1
    indexed = Image.frombytes("P", (48, 32), half.tobytes())
    indexed.putpalette([200, 10, 20, 30, 40, 50])
    two = np.where(half[..., None] > 0, np.array([30, 40, 50], np.uint8), np.array([200, 10, 20], np.uint8)).astype(
        np.uint8
    )
    hidden = np.where(half[..., None] > 0, two, np.uint8(255)).astype(np.uint8)
    shared = over_white(two, np.where(half > 0, 255, 100).astype(np.uint8))
    keyed = np.where((RGB == RGB[0, 0]).all(axis=2, keepdims=True), np.uint8(255), RGB).astype(np.uint8)
    return {
        "rgba png": Odd(saved(with_alpha()), over_white(RGB, alpha), 1, said),
        "gray and alpha png": Odd(
            saved(Image.merge("LA", (LUMA, Image.fromarray(alpha)))), over_white(GRAY, alpha), 1, said
        ),
        "rgba webp": Odd(saved(with_alpha(), "WEBP", lossless=True, exact=True), over_white(RGB, alpha), 1, said),
        "rgba tiff": Odd(saved(with_alpha(), "TIFF"), over_white(RGB, alpha), 1, said),
        "palette": Odd(saved(indexed), two),
        "palette with a clear entry": Odd(saved(indexed, transparency=0), hidden, 0, said),
        "palette with half clear entries": Odd(saved(indexed, transparency=bytes([100, 255])), shared, 1, said),
        "gif with a clear entry": Odd(saved(indexed, "GIF", transparency=0), hidden, 0, said),
        "one colour clear": Odd(saved(IMAGE, transparency=tuple(int(v) for v in RGB[0, 0])), keyed, 0, said),
        "opaque alpha": Odd(saved(IMAGE.convert("RGBA")), RGB),
    }


def deep() -> dict[str, Odd]:
    ramp = np.linspace(0, 65535, 48 * 32).round().astype(np.uint16).reshape(32, 48)
    eight = np.round(ramp / 257).astype(np.uint8)
    grays = eight[..., None].repeat(3, axis=2)
    wide = RGB.astype(np.uint16) * 257
    clear = fading().astype(np.uint16)[..., None] * 257
    bits = np.asarray(LUMA) > 127
    black = (bits[..., None].repeat(3, axis=2) * np.uint8(255)).astype(np.uint8)
    nibbles = b"".join(b"\0" + bytes([0x1B, 0xE4]) for _ in range(3))
    four = np.array([[0, 85, 170, 255, 255, 170, 85, 0]] * 3, np.uint8)
    return {
        "16 bit gray png": Odd(saved(Image.fromarray(ramp)), grays),
        "16 bit gray tiff": Odd(saved(Image.fromarray(ramp), "TIFF"), grays),
        "16 bit rgb png": Odd(deep_png(wide, 2), RGB),
        "16 bit rgb png of all values": Odd(deep_png(ramp[..., None].repeat(3, axis=2), 2), grays, 1),
        "16 bit rgba png": Odd(deep_png(np.dstack([wide, clear]), 6), over_white(RGB, fading()), 1, "over white"),
        "16 bit gray and alpha png": Odd(
            deep_png(np.dstack([wide[..., 1:2], clear]), 4), over_white(GRAY, fading()), 1, "over white"
        ),
        "1 bit png": Odd(saved(Image.fromarray(bits)), black),
        "1 bit tiff": Odd(saved(Image.fromarray(bits), "TIFF", compression="group4"), black),
        "2 bit png": Odd(png(8, 3, 2, 0, nibbles), four[..., None].repeat(3, axis=2)),
        "32 bit integers": Odd(
            saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), said="8 or 16 bits a channel"
        ),
        "floating point": Odd(saved(Image.new("F", (4, 4)), "TIFF"), said="floating point"),
    }


def several() -> dict[str, Odd]:
    frames = [IMAGE, Image.new("RGB", IMAGE.size, "blue")]
    said = "first of its 2 frames"
    more = {"save_all": True, "append_images": frames[1:]}
    flat = [Image.new("RGB", (48, 32), colour) for colour in ("red", "blue")]
    red = np.asarray(flat[0])
    return {
        "animated gif": Odd(saved(flat[0], "GIF", save_all=True, append_images=flat[1:]), red, 0, said, "a.gif"),
        "animated webp": Odd(saved(IMAGE, "WEBP", lossless=True, **more), RGB, 0, said, "a.webp"),
        "animated png": Odd(saved(IMAGE, "PNG", **more), RGB, 0, said),
        "pages of a tiff": Odd(saved(IMAGE, "TIFF", **more), RGB, 0, said, "a.tif"),
        "two pictures of a camera": Odd(saved(IMAGE, "MPO", quality=95, subsampling=0, **more), RGB, 6, said, "a.mpo"),
        "avif": Odd(saved(IMAGE, "AVIF", quality=95, subsampling="4:4:4"), RGB, 8, "", "a.avif"),
        "lossy webp": Odd(saved(LUMA, "WEBP", quality=95), GRAY, 6, "", "a.webp"),
        "progressive jpeg": Odd(saved(IMAGE, "JPEG", quality=95, subsampling=0, progressive=True), RGB, 6, "", "a.jpg"),
        "compressed tiff": Odd(saved(IMAGE, "TIFF", compression="tiff_lzw"), RGB),
        "palette bmp": Odd(saved(LUMA, "BMP"), GRAY, 0, "", "a.bmp"),
    }


def small_and_wrong() -> dict[str, Odd]:
    dot = np.array([[[9, 99, 199]]], np.uint8)
    strip = blocks(1, 400)
    whole = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    flat = saved(IMAGE)
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", huge) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    gif = b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + b","
    gif += struct.pack("<HHHH", 0, 0, 60_000, 60_000) + b"\0\x02\x02\x44\x01\0;"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    return {
        "one pixel": Odd(saved(Image.fromarray(dot)), dot),
        "a column of 400": Odd(saved(Image.fromarray(strip)), strip),
        "a row of 400": Odd(saved(Image.fromarray(strip.transpose(1, 0, 2).copy())), strip.transpose(1, 0, 2)),
        "jpeg named png": Odd(saved(IMAGE, "JPEG", quality=95, subsampling=0), RGB, 6),
        "png without a suffix": Odd(flat, RGB, name="picture"),
        "a name in other letters": Odd(flat, RGB, name="фото 写真 é.png"),
        "words after the end": Odd(flat + b"more words", RGB),
        "cut jpeg": Odd(whole[: len(whole) // 2], said="damaged or truncated"),
        "cut png": Odd(flat[:-40], said="damaged or truncated"),
        "head of a png alone": Odd(flat[:20], said="must be a"),
        "empty": Odd(b"", said="empty file"),
        "bomb png": Odd(bomb, said="at most 50000000 pixels"),
        "bomb gif": Odd(gif, said="at most 50000000 pixels"),
        "words": Odd(b"these are words, not pixels", said="got something else"),
        "svg": Odd(svg, said="got something else"),
        "icon": Odd(saved(IMAGE.resize((32, 32)), "ICO"), said="got something else"),
    }


def all_of_them() -> dict[str, Odd]:
    """Every case by its name."""
    rooms = (oriented(), coloured(), transparent(), deep(), several(), small_and_wrong())
    return {name: odd for room in rooms for name, odd in room.items()}
