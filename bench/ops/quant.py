"""Rows to one byte per element, at the widths of Qwen-Image's layers."""

from __future__ import annotations

from functools import partial

import torch

from ...kernels.quant import SCALES, quantise_tokens, reference, rotate
from . import Case, Maker, planned

GROUP = 256


def _case(weight_format: str, tokens: int, columns: int, device: torch.device, generator: torch.Generator) -> Case:
    x = torch.randn(tokens, columns, device=device, generator=generator)
    x[:, ::101] *= 20
    x = x.bfloat16()
    group = GROUP if weight_format == "int8" else 1
    matrix = rotate(torch.eye(GROUP, device=device), GROUP).to(x.dtype)
    implementation = planned("quant", device)

    def plain() -> torch.Tensor:
        values = (x.view(-1, GROUP) @ matrix).view(x.shape).float() if weight_format == "int8" else x.float()
        if weight_format == "int8":
            return (values / (values.abs().amax(1, keepdim=True) / 127)).round().to(torch.int8)
        return (values / (values.abs().amax(1, keepdim=True) / 448)).clamp(-448, 448).to(torch.float8_e4m3fn)

    return Case(
        lambda: quantise_tokens(x, weight_format, group, implementation=implementation)[0],
        expected=reference.quantise(x, plain().dtype, group, SCALES[0])[0],
        eager=plain,
        limit="copy",
        work=x.nbytes + x.numel() + 4 * tokens,
        bound=0.0,
        implementation=implementation,
    )


CASES: dict[str, Maker] = {
    f"{weight_format} {tokens}x{columns}": partial(_case, weight_format, tokens, columns)
    for tokens, columns in ((1, 3072), (250, 3072), (250, 12288), (8192, 3072), (8192, 12288))
    for weight_format in ("int8", "fp8")
}
LARGE = ("int8 8192x12288", "fp8 8192x12288")
