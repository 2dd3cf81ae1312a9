"""What a linear layer does to its sums before it writes them: GELU, or a gate and a residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import KernelError

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """``gelu(y)``, and after it ``residual + gate * y``; y is the linear layer with its bias, in float32.

    A fused layer rounds once, when the result is written. What it reads stays as it is: a side branch that wants the
    input of the layer unrotated and in its own dtype has it.

    Attributes:
        gelu: the tanh form of GELU.
        gate: [N], float32 or the dtype of x; None for none.
        gate_rest: the same for tokens from ``split`` on; None where all tokens share the gate.
        split: tokens of each batch element that take ``gate``.
        residual: [..., N] of the dtype of x, shaped as the result; together with ``gate`` alone.
    """

    gelu: bool = False
    gate: torch.Tensor | None = None
    gate_rest: torch.Tensor | None = None
    split: int | None = None
    residual: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Flat(Epilogue):
    """An epilogue that was checked, over rows [M, N].

    Attributes:
        period: rows after which the two ranges repeat.
    """

    period: int = 1

    def ranges(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Tokens and their gate."""
        if self.gate is not None and self.gate_rest is not None:
            yield slice(0, self.split), self.gate
            yield slice(self.split, None), self.gate_rest
        elif self.gate is not None:
            yield slice(None), self.gate


def flat(epilogue: Epilogue | None, like: torch.Tensor, columns: int) -> Flat:
    """The epilogue of a layer that makes ``columns`` of every row of ``like``, over rows.

    Raises:
        KernelError: a tensor of another shape, dtype or device, a gate without a residual or the reverse, or a second
            range without its length or the reverse.
    """
    if epilogue is None:
        return Flat()
    _check_pairs(epilogue)
    shape = (*like.shape[:-1], columns)
    for name in ("gate", "gate_rest"):
        gate = getattr(epilogue, name)
        if gate is not None and (gate.dtype not in (torch.float32, like.dtype) or not _lies(gate, (columns,), like)):
            raise KernelError(f"{name} must be {like.dtype} [{columns}] on {like.device}, got {_described(gate)}")
    if epilogue.residual is None:
        return Flat(gelu=epilogue.gelu)
    period = shape[-2] if len(shape) > 1 else 1
    one = epilogue.split is None or epilogue.split >= period
    residual = result_rows("residual", epilogue.residual, shape, like)
    rest, split = (None, None) if one else (epilogue.gate_rest, epilogue.split)
    return Flat(epilogue.gelu, epilogue.gate, rest, split, residual, period)


def _check_pairs(epilogue: Epilogue) -> None:
    if (epilogue.gate is None) != (epilogue.residual is None):
        there, missing = ("residual", "gate") if epilogue.gate is None else ("gate", "residual")
        raise KernelError(f"{missing} must be given with {there}, got None")
    if (epilogue.gate_rest is None) != (epilogue.split is None):
        raise KernelError(f"split must be given with gate_rest and nothing else, got {epilogue.split}")
    if epilogue.split is not None and (epilogue.split < 0 or epilogue.gate is None):
        raise KernelError(f"split must be at least 0, for a gate, got {epilogue.split}")


def result_rows(subject: str, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A tensor shaped as the result, as rows [M, N] over the same memory.

    Raises:
        KernelError: another shape, dtype or device, or rows that do not lie at equal distances.
    """
    if x.dtype != like.dtype or not _lies(x, shape, like):
        raise KernelError(f"{subject} must be {like.dtype} {list(shape)} on {like.device}, got {_described(x)}")
    try:
        return x.view(-1, shape[-1])
    except RuntimeError:
        raise KernelError(f"{subject} must have rows at equal distances, got strides {x.stride()}") from None


def _lies(x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> bool:
    return tuple(x.shape) == shape and x.device == like.device and (x.stride(-1) == 1 or shape[-1] == 1)


def _described(x: torch.Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} of strides {x.stride()} on {x.device}"


def finish(y: torch.Tensor, epilogue: Flat, columns: slice, out: torch.Tensor) -> None:
    """Write ``columns`` of out [M, N] from y, float32 [M, columns], which is overwritten; out may be the residual."""
    if epilogue.gelu:
        torch.ops.aten.gelu_(y, approximate="tanh")
    for tokens, gate in epilogue.ranges():
        y.view(-1, epilogue.period, y.shape[1])[:, tokens].mul_(gate[columns].float())
    out[:, columns] = y if epilogue.residual is None else y.add_(epilogue.residual[:, columns])


def apply(y: torch.Tensor, epilogue: Epilogue | None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The epilogue after a layer that is not fused: y [..., N] was rounded to its dtype, and GELU rounds once more.

    Args:
        y: the layer's result; overwritten.
        epilogue: None for none; the residual stays as it is unless it is ``out``.
        out: where the result goes; None for a new tensor, or y.

    Raises:
        KernelError: as :func:`flat`.
    """
    checked = flat(epilogue, y, y.shape[-1])
    if checked.gelu:
        torch.ops.aten.gelu_(y, approximate="tanh")
    if epilogue is None or epilogue.residual is None:
        return y if out is None else out.copy_(y)
    base = epilogue.residual if out is epilogue.residual else _copied(epilogue.residual, out)
    for tokens, gate in checked.ranges():
        if checked.gate_rest is None:
            base.addcmul_(y, gate)
        else:
            base[..., tokens, :].addcmul_(y[..., tokens, :], gate)
    return base


def _copied(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return x.clone() if out is None else out.copy_(x)
