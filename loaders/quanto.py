"""Checkpoints in the names of optimum-quanto, 8-bit weights, read and written without that library.

A linear layer ``x`` is stored as ``x.weight._data`` [N, ...] (int8 for qint8, e4m3 for qfloat8), ``x.weight._scale``
[N, 1, ...] in the model's dtype (a scalar where N is 1), ``x.bias``, and the activation scales ``x.input_scale`` and
``x.output_scale``. Weight = _data * _scale. Rows are not rotated. Activation scales only mean something to quanto's own
int8 activations; the weights are the same without them.

Source: huggingface/optimum-quanto@v0.2.7:optimum/quanto/nn/qmodule.py, tensor/weights/qbytes.py, and the metadata of
deepbeepmeep/mmgp@main:src/mmgp/safetensors2.py; names and meaning only.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, OutputError
from .checkpoint import Checkpoint
from .header import TensorInfo

if TYPE_CHECKING:
    import torch

MAP_NAME = "quanto_qmap.json"
"""The library's name for the file beside the weights that says which layers are quantised."""

DATA, SCALE = "._data", "._scale"
ACTIVATION_SCALES = (".input_scale", ".output_scale")
_FORMATS = {"I8": "int8", "F8_E4M3": "fp8"}
_QTYPES = {"torch.int8": "qint8", "torch.float8_e4m3fn": "qfloat8_e4m3fn"}


def detect_quanto(checkpoint: Checkpoint) -> str | None:
    """The weight format of a quanto checkpoint, ``int8`` or ``fp8``; None if it is no quanto checkpoint.

    Raises:
        CheckpointError: quanto tensors of another kind (4 or 2 bits, e5m2), of both kinds, or without their scales.
    """
    stored = {name.removesuffix(DATA): info for name, info in checkpoint.tensors.items() if name.endswith(DATA)}
    orphans = [n for n in checkpoint.tensors if n.endswith(SCALE) and n.removesuffix(SCALE) not in stored]
    if orphans:
        raise CheckpointError(
            f"{checkpoint.place}: {orphans[0]!r} must stand beside {orphans[0].removesuffix(SCALE) + DATA!r}, "
            "got no such tensor"
        )
    for name, info in stored.items():
        _check_rows(checkpoint, name, info)
    formats = sorted({_FORMATS[info.dtype] for info in stored.values()})
    if len(formats) > 1:
        raise CheckpointError(f"{checkpoint.place}: quanto weights must be of one kind, got {' and '.join(formats)}")
    return formats[0] if formats else None


def logical_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The tensors of the model that was quantised, name to shape: rows under their plain name, no scales."""
    return {
        name.removesuffix(DATA): info.shape
        for name, info in checkpoint.tensors.items()
        if not name.endswith((SCALE, *ACTIVATION_SCALES))
    }


def read_rows(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The stored rows of a weight, as they are.

    Args:
        checkpoint: a quanto checkpoint.
        name: the weight's plain name, ``x.weight``.

    Returns:
        stored [N, ...], int8 or float8_e4m3fn, and scale float32 [N]; stored * scale = weight.

    Raises:
        CheckpointError: there is no such weight, or it is of another kind.
    """
    import torch

    info = checkpoint.info(name + DATA)
    _check_rows(checkpoint, name, info)
    stored, scale = checkpoint.read(name + DATA), checkpoint.read(name + SCALE, torch.float32)
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CheckpointError(
            f"{checkpoint.place}: scale of {name!r} must be finite and at least 0, got something else"
        )
    if stored.dtype == torch.float8_e4m3fn and bool((stored.view(torch.uint8) & 127 == 127).any()):
        raise CheckpointError(
            f"{checkpoint.place}: rows of {name!r} must be finite, got NaN", hint="quanto makes it of a row of zeros"
        )
    return stored, scale.reshape(-1).expand(info.shape[0]).contiguous()


def dequantise(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A weight in its shape [N, ...]: ``_data * _scale`` in float32, then cast.

    Args:
        checkpoint: a quanto checkpoint.
        name: the weight's plain name, ``x.weight``.
        dtype: of the result; that of the stored scale when None.

    Raises:
        CheckpointError: as :func:`read_rows`.
    """
    from ..kernels.quant import dequantise_rows
    from .checkpoint import stored_dtype

    stored, scale = read_rows(checkpoint, name)
    dtype = stored_dtype(checkpoint.info(name + SCALE)) if dtype is None else dtype
    return dequantise_rows(stored.flatten(1), scale, 1, dtype).view(stored.shape)


def write_quanto(
    path: Path, quantised: Iterable[tuple[str, torch.Tensor, torch.Tensor]], plain: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint that optimum-quanto loads, and its map ``quanto_qmap.json`` in the same folder.

    Both appear whole or not at all, and the map also stands in the file's metadata. All tensors are in memory at once,
    one byte per quantised weight.

    Args:
        path: the safetensors file; it wants a folder of its own.
        quantised: name ``x.weight``, stored rows [N, K] (int8 not rotated, or float8_e4m3fn), scale [N]. The library
            computes in the dtype of the scale, so it should be that of the plain tensors: quantise with
            ``scale_dtype=torch.bfloat16`` for a bfloat16 model.
        plain: biases, norms and everything else by name.

    Raises:
        CheckpointError: a name that is no weight or stands twice.
        KernelError: rows or scales of the wrong kind.
        OutputError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in plain.items()}
    layers: dict[str, dict[str, str]] = {}
    for name, stored, scale in quantised:
        layer = _layer_of(name, layers, tensors)
        layers[layer] = {"weights": _QTYPES.get(str(stored.dtype), "none"), "activations": "none"}
        tensors |= _stored_layer(layer, stored, scale)
    document = json.dumps(layers, indent=1)
    metadata = {
        "format": "pt",
        "quantization_format": "quanto",
        "quantization_map_base64": base64.b64encode(document.encode()).decode(),
    }
    tensors = _apart(tensors)
    path = Path(path)
    _write_all(
        {
            path: lambda place: save_file(tensors, place, metadata),
            path.with_name(MAP_NAME): lambda place: place.write_text(document, "utf-8"),
        }
    )


def _check_rows(checkpoint: Checkpoint, name: str, info: TensorInfo) -> None:
    if info.dtype not in _FORMATS:
        raise CheckpointError(
            f"{checkpoint.place}: quanto rows of {name!r} must be qint8 or qfloat8 (e4m3), got {info.dtype}",
            hint="use the bf16 safetensors file of the same model",
        )
    scale = checkpoint.info(name + SCALE)
    rows, rest = info.shape[:1], info.shape[1:]
    if not rest or (scale.shape != (*rows, *(1 for _ in rest)) and scale.shape not in ((), (1,))):
        raise CheckpointError(
            f"{checkpoint.place}: scale of {name!r} must be one number per row of {list(info.shape)}, "
            f"got shape {list(scale.shape)}"
        )


def _layer_of(name: str, layers: Mapping[str, object], tensors: Mapping[str, object]) -> str:
    layer = name.removesuffix(".weight")
    if layer == name:
        raise CheckpointError(f"quantised tensor must be named 'layer.weight', got {name!r}")
    if layer in layers or name in tensors:
        raise CheckpointError(f"tensor {name!r} must be given once, got it twice")
    return layer


def _stored_layer(layer: str, stored: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    from ..kernels.quant import SCALES, check_stored

    check_stored(stored, scale, torch.float8_e4m3fn if stored.is_floating_point() else torch.int8, SCALES)
    one = torch.ones((), dtype=scale.dtype)
    scale = scale.detach().cpu()
    return {
        f"{layer}.weight{DATA}": stored.detach().cpu().contiguous(),
        f"{layer}.weight{SCALE}": scale[:, None].contiguous() if len(scale) > 1 else scale.reshape(()).clone(),
        **{layer + tail: one.clone() for tail in ACTIVATION_SCALES},
    }


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with a copy of each that is another one again; safetensors takes none twice."""
    places: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in places else tensor
        places.add(tensor.data_ptr())
    return apart


def _write_all(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Fill temporary files beside the final names, flush them to the disk, and only then rename them all."""
    from safetensors import SafetensorError

    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.part") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary[path])
            with temporary[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path, place in temporary.items():
            os.replace(place, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{next(iter(files))} must be writable, got: {getattr(error, 'strerror', None) or error}",
            hint="choose another place for it, or make room there",
        ) from error
    finally:
        for place in temporary.values():
            with contextlib.suppress(OSError):
                place.unlink()
