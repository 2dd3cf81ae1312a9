"""Results out: pictures and latents with the record of how they were made, and that record back.

A PNG carries three text chunks: ``parameters`` in the spelling of the AUTOMATIC1111 web UI, which most tools read;
``qengine``, the whole record as JSON; and an XMP packet with IPTC's digital source type. JPEG and WebP carry the first
in EXIF's UserComment and the other two in XMP. Latents carry the JSON in the safetensors header.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import CheckpointError, InputError, OutputError
from ..loaders.header import read_header
from .files import write_tensors
from .whole import write_whole

SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
EDITED = SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
GENERATED = SOURCE_TYPES + "trainedAlgorithmicMedia"
MAX_RECORD_BYTES = 4 << 20

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LATENTS_SUFFIX = ".safetensors"
_KEY = "qengine"
_NAMESPACE = "urn:qengine:metadata:1"
_XMP_KEY = "XML:com.adobe.xmp"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_NO_RECORD = "was it made with --no-metadata, or saved again by another program?"


def write_picture(path: str | Path, image: Image.Image, metadata: Mapping[str, Any] | None) -> None:
    """Write a picture in the format of its suffix, whole or not at all.

    Args:
        path: .png, .jpg, .jpeg or .webp.
        image: to write.
        metadata: the record of the run (JSON values), or None to write no text at all.

    Raises:
        OutputError: another suffix, a place that cannot be written, or a record too long for the format.
    """
    path = Path(path)
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise OutputError(f"{path} must end in one of {', '.join(_FORMATS)}, got {path.suffix or 'no suffix'}")
    options = _save_options(kind, metadata)
    try:
        write_whole(path, lambda temporary: image.save(temporary, format=kind, **options))
    except ValueError as error:
        raise OutputError(f"{path} must hold its record, got: {error}", hint="write a .png") from error


def write_latents(path: str | Path, latents: torch.Tensor, metadata: Mapping[str, Any] | None) -> None:
    """Write ``latents`` as the tensor of that name in a safetensors file, whole or not at all.

    Raises:
        OutputError: a place that cannot be written.
    """
    record = None if metadata is None else {_KEY: _to_json(metadata)}
    write_tensors(Path(path), {"latents": latents}, record)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The record in a picture or a latents file that qengine wrote; pixels and tensors are not read.

    Raises:
        InputError: no such file, not of these formats, damaged, or without a record.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} must be a file that qengine wrote, got no such file", hint="check the name")
    try:
        text = _find_record(path)
    except _DAMAGE as error:
        raise InputError(f"{path} must be a whole picture or latents file, got a damaged one ({error})") from error
    if text is None:
        raise InputError(f"{path} must carry a qengine record, got none", hint=_NO_RECORD)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the record in {path} must be JSON, got: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"the record in {path} must be a JSON object, got {type(record).__name__}")
    return record


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The record in the spelling of the AUTOMATIC1111 web UI."""
    request = metadata.get("request", {})
    lines = [str(request.get("prompt", ""))]
    if request.get("negative_prompt"):
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    size = request.get("size")
    facts = {
        "Steps": request.get("num_inference_steps"),
        "Sampler": "Euler",
        "CFG scale": request.get("true_cfg_scale", request.get("guidance_scale")),
        "Seed": request.get("seed"),
        "Size": f"{size[0]}x{size[1]}" if size else None,
        "Model": metadata.get("model", {}).get("label"),
        "Version": f"qengine {metadata.get('qengine', '')}".strip(),
    }
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _to_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(dict(metadata), ensure_ascii=True, allow_nan=False)


def _save_options(kind: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    if metadata is None:
        return options
    if kind == "PNG":
        text = PngInfo()
        text.add_text("parameters", parameters_text(metadata).replace("\0", " "))
        text.add_itxt(_KEY, _to_json(metadata))
        text.add_itxt(_XMP_KEY, _xmp(metadata, with_record=False))
        return options | {"pnginfo": text}
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + parameters_text(metadata).encode("utf-16-be", "replace")
    return options | {"exif": exif.tobytes(), "xmp": _xmp(metadata, with_record=True).encode()}


def _xmp(metadata: Mapping[str, Any], *, with_record: bool) -> str:
    kind = EDITED if metadata.get("kind") == "edit" else GENERATED
    record = f"<qengine:record>{escape(_to_json(metadata))}</qengine:record>" if with_record else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f' xmlns:qengine="{_NAMESPACE}">'
        f"<Iptc4xmpExt:DigitalSourceType>{kind}</Iptc4xmpExt:DigitalSourceType>{record}"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def _find_record(path: Path) -> str | None:
    if path.suffix.lower() == _LATENTS_SUFFIX:
        try:
            return read_header(path).metadata.get(_KEY)
        except CheckpointError as error:
            raise ValueError(error.message) from error
    with open(path, "rb") as file:
        if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE:
            return _find_in_png(file)
        file.seek(0)
        return _find_in_xmp(file)


def _find_in_png(file: BinaryIO) -> str | None:
    """Walk over the chunks; only text of a bounded length is read."""
    while True:
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"IEND":
            return None
        if name != b"iTXt" or length > MAX_RECORD_BYTES:
            file.seek(length + 4, 1)
            continue
        body = file.read(length)
        if len(body) < length or struct.unpack(">I", file.read(4))[0] != zlib.crc32(name + body):
            raise ValueError("text chunk is cut or altered")
        if body.startswith(_KEY.encode() + b"\0"):
            return _itxt_text(body)


def _itxt_text(body: bytes) -> str:
    """The text of ``keyword 0, compressed, method, language 0, translated keyword 0, text``."""
    rest = body[body.index(0) + 1 :]
    fields = rest[2:].split(b"\0", 2)
    if len(fields) != 3:
        raise ValueError("text chunk is cut or altered")
    if not rest[0]:
        return fields[2].decode()
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(fields[2], MAX_RECORD_BYTES)
    if not unpacker.eof:
        raise ValueError(f"record is longer than {MAX_RECORD_BYTES} bytes or cut")
    return text.decode()


def _find_in_xmp(file: BinaryIO) -> str | None:
    try:
        with Image.open(file, formats=["JPEG", "WEBP"]) as image:
            packet = image.info.get("xmp")
    except Image.UnidentifiedImageError as error:
        raise ValueError("neither PNG, JPEG, WebP nor safetensors") from error
    if not isinstance(packet, bytes) or len(packet) > MAX_RECORD_BYTES:
        return None
    # Packets of ours declare no entities; what declares some may expand without bound.
    if b"<!" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.decode().strip("\0"))
    except ElementTree.ParseError:
        return None
    return root.findtext(f".//{{{_NAMESPACE}}}record")
