"""What works here beyond what the architecture says: tried on the device itself, once per process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import KernelError, PlanError
from ..kernels import native
from ..kernels.attention import LIBRARIES
from ..kernels.attention.libraries import found, importable

if TYPE_CHECKING:
    import torch

Matrix = tuple[int, ...]
"""Rows N and columns K of a weight."""

ROWS = (17, 64, 256, 1024)
"""Tokens of every trial: what a library supports was seen to change below 257 and not above, so a plan does not depend
on the length of a prompt."""

CHECKED = 64
ALIGNMENT = 8
LEAST_ROWS = 32
WRONG = 2**-7
"""Bound on the relative error of a sum of small whole numbers, which bfloat16 rounds by at most half of it."""


def unusable(device: torch.device, attention: str, products: Mapping[str, Collection[Matrix]]) -> dict[str, str]:
    """Why implementations cannot be used on a device, by name; those that can are left out.

    Args:
        device: where the run is.
        attention: the one that is asked for; its library is imported, others are only looked for.
        products: ``scaled_mm`` and ``int_mm`` to the weights that they would multiply by; each is tried on all.

    Raises:
        PlanError: a trial found no memory, which says nothing about what the device can do.
    """
    reasons = {"native": native.reason()}
    if device.type == "cuda":
        reasons["triton"] = triton()
        reasons |= {name: _attention(str(device), name) for name in ("sdpa-flash", "sdpa-efficient")}
        for name, matrices in products.items():
            tried = (product(str(device), name, *matrix) for matrix in sorted(matrices))
            reasons[name] = next((reason for reason in tried if reason), "")
    reasons |= {mode: importable(mode) if mode == attention else found(mode) for mode in LIBRARIES}
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def triton() -> str:
    """Why Triton cannot be imported; empty where it can."""
    try:
        import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton cannot be imported ({' '.join(str(error).split())}): pip install 'qengine[gpu]'"
    return ""


@cache
def _attention(device: str, mode: str) -> str:
    """Why torch's attention has no such kernel here; empty where it has one."""
    import torch

    from ..kernels.attention import attend

    def trial() -> str:
        x = torch.zeros(1, CHECKED, 1, CHECKED, dtype=torch.bfloat16, device=device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of each reason, and then raises
                attend(x, x, x, mode=mode)
        except KernelError as error:
            return error.message
        return ""

    return tried(trial, f"attention by {mode}")


@cache
def product(device: str, kernel: str, rows: int, columns: int) -> str:
    """Why ``scaled_mm`` or ``int_mm`` does not multiply by a weight [rows, columns] here; empty where it does.

    Raises:
        PlanError: there is no memory to try it.
    """
    for tokens in ROWS:
        words = f"[{tokens}, {columns}] x [{columns}, {rows}]"
        reason = tried(partial(_multiply, device, kernel, tokens, rows, columns), f"{kernel} of {words}")
        if reason:
            return f"{words}: {reason}"
    return ""


def tried(trial: Callable[[], str], what: str) -> str:
    """The outcome of a trial: its own words, those of an error, or "" where it works.

    Raises:
        PlanError: memory ran out twice, the second time with the allocator emptied.
    """
    import torch

    from .ceiling import is_out_of_memory

    for _ in range(2):
        try:
            return trial()
        except (RuntimeError, ValueError, TypeError) as error:
            if not is_out_of_memory(error):
                return " ".join(str(error).split())[:200]
        torch.cuda.empty_cache()
    raise PlanError(f"device memory must be enough to try {what}, got none free", hint="close other programs")


def _multiply(device: str, kernel: str, tokens: int, rows: int, columns: int) -> str:
    """Multiply small whole numbers, whose sums are exact in float32, and look at some of the results."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    whole = partial(torch.randint, -3, 4, generator=generator, device=device, dtype=torch.int8)
    if kernel == "int_mm":
        tokens = max(LEAST_ROWS, tokens + -tokens % ALIGNMENT)
        a, b = whole((tokens, columns + -columns % ALIGNMENT)), whole((rows + -rows % ALIGNMENT, columns))
        b = torch.nn.functional.pad(b, (0, -columns % ALIGNMENT))
        made, scale = torch._int_mm(a, b.t()), 1.0
    else:
        a, b = (whole(shape).to(torch.float8_e4m3fn) for shape in ((tokens, columns), (rows, columns)))
        made, scale = _scaled_mm(a, b), 0.25
    some = slice(-CHECKED, None)
    expected = (a[some].float() @ b[some].float().t()) * scale
    error = (made[some, some].float() - expected).norm() / expected.norm()
    return "" if float(error) <= WRONG else f"gives wrong sums (relative error {float(error):.2g})"


def _scaled_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """By row scales of one half each and a bias of zero, summed in float32, as ``kernels.linear_fp8`` does."""
    import torch

    half = partial(torch.full, fill_value=0.5, dtype=torch.float32, device=a.device)
    bias = torch.zeros(len(b), dtype=torch.bfloat16, device=a.device)
    return torch._scaled_mm(
        a,
        b.t(),
        scale_a=half((len(a), 1)),
        scale_b=half((1, len(b))),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=False,
    )
