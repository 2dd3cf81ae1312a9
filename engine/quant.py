"""Linear layers of 8-bit weights that a tape can rebind like any others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import nn

from ..errors import RequestError
from ..kernels.dispatch import definition
from ..kernels.epilogue import Epilogue, apply
from ..kernels.linear_fp8 import TOKEN_PATHS, linear_fp8
from ..kernels.linear_int8 import linear_int8
from ..kernels.quant import STORED, Tokens, dequantise_rows, make_tokens, quantise_rows
from .formats import QUANTISED, check_format, rotation_group


class QuantLinear(nn.Module):
    """``x @ (weight * scale).T + bias`` with plain tensors: weight [N, K] int8 or e4m3, scale float32 [N], bias [N].

    All three are parameters, in this order, so they carry the names of ``formats.slab_specs`` and a template rebinds
    them; built on the meta device, it holds no memory.

    Attributes:
        weight_format: ``int8`` or ``fp8``.
        group: rotation group of the columns; 1 for fp8.
        implementation: how it multiplies, see ``kernels.linear_int8`` and ``kernels.linear_fp8``.
        quantiser: what quantises its tokens, see ``kernels.quant``; the implementations have the same bits.

    Args:
        linear: the layer it stands for; its bias is taken over, its weight is not read.
        weight_format: ``int8`` or ``fp8``.
        implementation: the plan's choice; None for the definition of the format.
        quantiser: the plan's choice; None for ``triton`` before Triton's products and ``reference`` before others.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight_format: str,
        implementation: str | None = None,
        quantiser: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_format = weight_format
        self.implementation = implementation or definition(f"linear_{weight_format}")
        self.quantiser = quantiser or ("triton" if self.implementation == "triton" else "reference")
        self.group = row_group(linear.in_features, weight_format)
        rows = torch.empty(linear.weight.shape, dtype=STORED[weight_format], device="meta")
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(len(rows), dtype=torch.float32, device="meta"), requires_grad=False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)

    def forward(
        self, x: torch.Tensor | Tokens, epilogue: Epilogue | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K], or its tokens, to [..., N] in the dtype of x, by way of the epilogue; into ``out`` where given."""
        if isinstance(x, torch.Tensor):
            x = self.tokens(x) or x
        if self.weight_format == "fp8":
            return linear_fp8(x, self.weight, self.scale, self.bias, self.implementation, epilogue=epilogue, out=out)
        more = {"epilogue": epilogue, "out": out, "implementation": self.implementation}
        return linear_int8(x, self.weight, self.scale, self.bias, self.group, **more)

    def tokens(self, x: torch.Tensor) -> Tokens | None:
        """What this layer multiplies by; None where that is x as it is."""
        if self.weight_format == "fp8" and self.implementation not in TOKEN_PATHS:
            return None
        return make_tokens(x, self.weight_format, self.group, self.quantiser)

    def takes_tokens_of(self, other: QuantLinear) -> bool:
        """Whether this layer quantises an input exactly as another does."""
        return _token_key(self) == _token_key(other)

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"{self.in_features}, {self.out_features}, {self.weight_format}, group={self.group}"


def _token_key(layer: QuantLinear) -> tuple[object, ...]:
    return layer.in_features, layer.weight_format, layer.group, layer.quantiser, layer.implementation


def linear(
    layer: nn.Module,
    x: torch.Tensor | Tokens,
    epilogue: Epilogue | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with what follows it: fused in a QuantLinear; after any other layer in its dtype and in place.

    Args:
        layer: a QuantLinear, or a layer that takes x alone.
        x: [..., K]; tokens for a QuantLinear only.
        epilogue: None for none.
        out: [..., N] in the dtype of x, which may be the residual; None for a new tensor.
    """
    if isinstance(layer, QuantLinear):
        return layer(x, epilogue, out)
    return apply(layer(x), epilogue, out)


def project(
    x: torch.Tensor, layers: Sequence[nn.Module], outs: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """The outputs of layers that share an input, in their order; it is quantised once where they do it alike.

    Args:
        x: [..., K].
        layers: linear layers of K columns.
        outs: where each output goes, None for a new tensor; None for all new.
    """
    first = layers[0]
    shared: torch.Tensor | Tokens = x
    if isinstance(first, QuantLinear):
        if all(isinstance(layer, QuantLinear) and layer.takes_tokens_of(first) for layer in layers):
            shared = first.tokens(x) or x
    places = [None] * len(layers) if outs is None else outs
    return [linear(layer, shared, out=out) for layer, out in zip(layers, places, strict=True)]


def row_group(columns: int, weight_format: str) -> int:
    """The rotation group of rows in a format: that of the columns for int8, 1 for fp8."""
    return rotation_group(columns) if weight_format == "int8" else 1


def quantise_weight(weight: torch.Tensor, weight_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [N, K] as a QuantLinear of this format wants it: stored [N, K] and scale float32 [N].

    Raises:
        KernelError: as ``kernels.quant.quantise_rows``.
    """
    return quantise_rows(weight, weight_format, row_group(weight.shape[-1], weight_format))


def dequantise_weight(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [N, K] that :func:`quantise_weight` was given, nearly."""
    weight_format = "int8" if stored.dtype == torch.int8 else "fp8"
    return dequantise_rows(stored, scale, row_group(stored.shape[-1], weight_format), dtype)


def quantise_module(
    module: nn.Module,
    weight_format: str,
    keep: Collection[str] = (),
    *,
    implementation: str | None = None,
    quantiser: str | None = None,
) -> None:
    """Put a QuantLinear in the place of every linear layer of a block, in place.

    Afterwards the block's named parameters are those of ``formats.slab_specs``, in its order; no weight is quantised
    here. In ``bf16`` the block stays as it is.

    Args:
        module: a block on the meta device.
        weight_format: ``bf16``, ``int8`` or ``fp8``.
        keep: names of matrices that stay plain (``img_mlp.net.2.weight``).
        implementation: how the layers multiply; see :class:`QuantLinear`.
        quantiser: what quantises their tokens.

    Raises:
        RequestError: no such format, a name in ``keep`` that is no matrix of the block, a block with weights in it, or
            a matrix that belongs to no plain linear layer.
    """
    if check_format(weight_format) not in QUANTISED:
        return
    parameters = dict(module.named_parameters())
    matrices = {name for name, value in parameters.items() if value.dim() == 2 and name.endswith(".weight")}
    _check_block(parameters, matrices, keep)
    for name in sorted(matrices - set(keep)):
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        owner = module.get_submodule(parent)
        plain = getattr(owner, leaf)
        if type(plain) is not nn.Linear:
            raise RequestError(f"matrix {name!r} must belong to a linear layer, got {type(plain).__name__}")
        owner.register_module(leaf, QuantLinear(plain, weight_format, implementation, quantiser))


def _check_block(parameters: dict[str, nn.Parameter], matrices: set[str], keep: Collection[str]) -> None:
    strange = sorted(set(keep) - matrices)
    if strange:
        raise RequestError(f"kept names must be matrices of the block, got {', '.join(map(repr, strange))}")
    real = [name for name, value in parameters.items() if not value.is_meta]
    if real:
        raise RequestError(f"block must be on the meta device to be quantised, got weights in {real[0]!r}")
