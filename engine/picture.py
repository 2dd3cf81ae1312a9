"""Pictures in: any common file to an upright 8-bit sRGB image, and back and forth between images and tensors."""

from __future__ import annotations

import hashlib
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from ..errors import InputError, RequestError

FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
MAX_PIXELS: Final = 50_000_000
MAX_FILE_BYTES: Final = 1 << 30
# What Pillow's readers raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, struct.error, zlib.error)


@dataclass(frozen=True)
class Picture:
    """A picture as the engine takes it.

    Attributes:
        image: mode RGB, upright, sRGB; mode L where it is a mask.
        sha256: of the file's bytes; of mode, size and pixels where the picture was handed over in memory.
        label: the path as given, or "picture".
        notes: decisions worth telling, one sentence each.
    """

    image: Image.Image
    sha256: str
    label: str
    notes: tuple[str, ...] = ()


def load_picture(source: str | PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a picture: upright (EXIF), in sRGB (ICC), 8 bits a channel, transparency over white, first frame.

    Args:
        source: a file, the bytes of one, or an image.
        max_pixels: cap on width x height, checked before anything is decoded.

    Raises:
        InputError: missing, a folder, empty, of no known format, damaged, or above the cap.
    """
    return _load(source, "picture", max_pixels, _normalise)


def load_mask(source: str | PathLike[str] | bytes | Image.Image, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a mask: upright, mode L, white where a change is asked.

    An alpha channel that is not opaque everywhere is the mask: transparent is white. Otherwise the brightness is.

    Args:
        source: a file, the bytes of one, or an image.
        max_pixels: as :func:`load_picture`.

    Raises:
        InputError: as :func:`load_picture`.
    """
    return _load(source, "mask", max_pixels, _as_mask)


def _load(
    source: str | PathLike[str] | bytes | Image.Image,
    what: str,
    max_pixels: int,
    take: Callable[[Image.Image, str, str, int], Picture],
) -> Picture:
    if isinstance(source, Image.Image):
        return take(source, what, "", max_pixels)
    label, data = (what, source) if isinstance(source, bytes) else (str(source), _read(Path(source)))
    if not data:
        raise InputError(f"{label} must be a picture, got an empty file")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with _open(data, label, max_pixels) as image:
                _check_pixels(image, label, max_pixels)
                image.load()
                picture = take(image, label, hashlib.sha256(data).hexdigest(), max_pixels)
    except _DAMAGE as error:
        raise InputError(
            f"{label} must be a whole picture, got a damaged or truncated file ({error})",
            hint="export the picture again",
        ) from error
    said = (str(warning.message) for warning in caught if warning.category is not Image.DecompressionBombWarning)
    notes = (*picture.notes, *(f"{label}: {text}" for text in dict.fromkeys(said)))
    return Picture(picture.image, picture.sha256, label, notes)


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{path} must be a picture, got a folder", hint="name one file in it")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} must be a picture, got a special file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path} must be at most {MAX_FILE_BYTES} bytes, got {size}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path} must be a picture, got no such file", hint="check the name") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be readable, got: {getattr(error, 'strerror', None) or error}") from error


def _open(data: bytes, label: str, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        return Image.open(BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise _too_large(label, f"far more ({error})", max_pixels) from error
    except Image.UnidentifiedImageError as error:
        known = ", ".join(name for name in FORMATS if name in Image.OPEN)
        raise InputError(
            f"{label} must be a picture ({known}), got something else or a damaged file",
            hint="convert it to PNG or JPEG",
        ) from error


def _check_pixels(image: Image.Image, label: str, max_pixels: int) -> None:
    if not image.width or not image.height:
        raise InputError(f"{label} must have pixels, got {image.width}x{image.height}")
    if image.width * image.height > max_pixels:
        raise _too_large(label, f"{image.width}x{image.height}", max_pixels)


def _too_large(label: str, got: str, max_pixels: int) -> InputError:
    return InputError(f"{label} must have at most {max_pixels} pixels, got {got}", hint="scale the picture down first")


def _normalise(image: Image.Image, label: str, sha256: str, max_pixels: int) -> Picture:
    _check_pixels(image, label, max_pixels)
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{label}: the first of its {frames} frames is used")
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    colour, alpha = _eight_bit(upright, label)
    rgb = _to_srgb(colour, profile, label, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
        notes.append(f"{label}: its transparent parts are laid over white")
    # A fresh image: no file handle, no metadata of the old one.
    plain = Image.frombytes("RGB", rgb.size, rgb.tobytes())
    return Picture(plain, sha256 or hashlib.sha256(_content(plain)).hexdigest(), label, tuple(notes))


def _as_mask(image: Image.Image, label: str, sha256: str, max_pixels: int) -> Picture:
    _check_pixels(image, label, max_pixels)
    colour, alpha = _eight_bit(ImageOps.exif_transpose(image), label)
    if alpha is not None and alpha.getextrema() != (255, 255):
        values, read = ImageOps.invert(alpha), "transparency"
    else:
        values, read = colour.convert("L"), "brightness"
    plain = Image.frombytes("L", values.size, values.tobytes())
    share = float(np.asarray(plain, dtype=np.float64).mean() / 255)
    note = f"{label}: {share:.1%} of it is to change, read from its {read}"
    return Picture(plain, sha256 or hashlib.sha256(_content(plain)).hexdigest(), label, (note,))


def _content(plain: Image.Image) -> bytes:
    return f"{plain.mode} {plain.size}".encode() + plain.tobytes()


def _eight_bit(image: Image.Image, label: str) -> tuple[Image.Image, Image.Image | None]:
    """(colour in a mode that ICC profiles speak of, alpha or None)."""
    if image.mode.startswith("I"):
        return _from_sixteen_bit(image, label)
    if image.mode == "F":
        raise InputError(f"{label} must have 8 or 16 bits a channel, got floating point", hint="convert it to PNG")
    if image.mode in ("LA", "La"):
        gray, alpha = image.convert("LA").split()
        return gray, alpha
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")), None


def _from_sixteen_bit(image: Image.Image, label: str) -> tuple[Image.Image, Image.Image | None]:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError(f"{label} must have 8 or 16 bits a channel, got values {values.min()} to {values.max()}")
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return gray, None
    return gray, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None, label: str, notes: list[str]) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip() or "an unnamed profile"
        if name.startswith("sRGB"):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        notes.append(f"{label}: its colour profile is ignored, it cannot be applied ({error})")
        return image.convert("RGB")
    notes.append(f"{label}: its colours are converted from {name} to sRGB")
    return image.convert("RGB") if converted is None else converted


def to_tensor(image: Image.Image) -> torch.Tensor:
    """``2 v / 255 - 1``: float32 [1, 3, H, W] in [-1, 1] of an RGB image."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(values).permute(2, 0, 1)[None].contiguous() - 1.0


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """``round(255 clamp(x / 2 + 1/2, 0, 1))``: the RGB image of [1, 3, H, W] in [-1, 1].

    Raises:
        RequestError: another shape, or a value that is not a number.
    """
    if pixels.ndim != 4 or tuple(pixels.shape[:2]) != (1, 3):
        raise RequestError(f"pixels must be of shape [1, 3, H, W], got {list(pixels.shape)}")
    values = pixels.detach()[0].float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise RequestError("pixels must be finite, got NaN or infinity")
    scaled = (values / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).mul(255).round()
    return Image.fromarray(scaled.to(torch.uint8).numpy())


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Lanczos, as diffusers' image processor does it."""
    return image.resize((width, height), Image.Resampling.LANCZOS)


def calculate_dimensions(area: float, ratio: float, multiple: int = 32) -> tuple[int, int]:
    """``w = sqrt(area * ratio)``, ``h = w / ratio``, both rounded to a multiple, at least one.

    Args:
        area: wanted width x height, in pixels.
        ratio: width / height.
        multiple: of which both sides are.

    Returns:
        (width, height).

    Raises:
        RequestError: a value is not positive.
    """
    if not (area > 0 and ratio > 0 and multiple > 0):
        raise RequestError(f"area, ratio and multiple must be positive, got {area}, {ratio}, {multiple}")
    width = (area * ratio) ** 0.5
    height = width / ratio
    return max(1, round(width / multiple)) * multiple, max(1, round(height / multiple)) * multiple
