"""Rounding to bfloat16 as a card does, to nearest with halves to even; Triton's interpreter cuts the bits off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def rounded_as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round float32 to bfloat16 as compiled kernels do."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(values, source, target, mode)
        floats = torch.from_numpy(np.array(values, dtype=np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
