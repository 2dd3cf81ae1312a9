"""The native rows: ``qengine_quantise`` of the C++ library, the bits of the reference from one pass over the memory."""

from __future__ import annotations

import torch

from ...errors import KernelError
from .. import native

_STORED = {torch.int8: 0, torch.float8_e4m3fn: 1}
_SCALES = {torch.float32: 0, torch.bfloat16: 1}

Rows = tuple[torch.Tensor, torch.Tensor]


def quantise(
    x: torch.Tensor,
    stored_dtype: torch.dtype,
    group: int,
    scale_dtype: torch.dtype,
    threads: int | None = None,
    *,
    out: Rows | None = None,
    isa: str = "best",
) -> Rows:
    """See ``kernels.quant.quantise_rows``; the rows of x may lie any distance apart.

    A row that is not finite gets a scale that is not finite.

    Args:
        x: [N, K], float32, bfloat16 or float16, on the CPU.
        stored_dtype: int8, or float8_e4m3fn, whose rows are never rotated.
        group: rotation group of int8 rows.
        scale_dtype: float32 or bfloat16.
        threads: 1 to 64; as many as torch uses when None.
        out: stored [N, K] and scale [N] to write to, contiguous; new ones when None.
        isa: ``best``, or one of ``native.ISAS`` that this CPU has.

    Raises:
        KernelError: wrong dtype, shape, device, group or threads, or no library; nothing is written then.
    """
    if stored_dtype not in _STORED or scale_dtype not in _SCALES:
        raise KernelError(
            f"stored must be int8 or float8_e4m3fn with float32 or bfloat16 scales, got {stored_dtype}, {scale_dtype}"
        )
    x = native.readable(x)
    group = group if stored_dtype == torch.int8 else 1
    if group not in (1, 4, 16, 64, 256) or x.shape[1] % group:
        raise KernelError(f"group must be 1, 4, 16, 64 or 256 and divide the {x.shape[1]} columns, got {group}")
    count, number = native.thread_count(threads), native.isa_number(isa)
    if out is None:
        out = torch.empty(x.shape, dtype=stored_dtype), torch.empty(x.shape[0], dtype=scale_dtype)
    stored, scale = out
    _check_out("stored", stored, x.shape, stored_dtype)
    _check_out("scale", scale, x.shape[:1], scale_dtype)
    options = _STORED[stored_dtype], group, _SCALES[scale_dtype]
    native.call("qengine_quantise", native.Matrix.of(x), *options, stored.data_ptr(), scale.data_ptr(), count, number)
    return stored, scale


def _check_out(subject: str, out: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    if out.dtype != dtype or out.shape != shape or out.device.type != "cpu" or not out.is_contiguous():
        found = f"{out.dtype} {list(out.shape)} on {out.device}" + ("" if out.is_contiguous() else ", not contiguous")
        raise KernelError(f"{subject} must be {dtype} {list(shape)} on the CPU, contiguous, got {found}")
