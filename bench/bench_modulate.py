"""LayerNorm with modulation and gated residual, beside a plain torch program and the bandwidth of the machine."""

from __future__ import annotations

from typing import Any

import pytest
from qengine.bench.ops import listed, measure


@pytest.mark.parametrize("case", listed("modulate"))
def test_modulate(benchmark: Any, case: str) -> None:
    """Checked against float64, then timed."""
    measure(benchmark, "modulate", case)
