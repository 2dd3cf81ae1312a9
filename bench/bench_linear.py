"""Linear layers of 8-bit weights, beside a dense layer of torch and the best library product of the machine."""

from __future__ import annotations

from typing import Any

import pytest
from qengine.bench.ops import listed, measure


@pytest.mark.parametrize("case", listed("linear"))
def test_linear(benchmark: Any, case: str) -> None:
    """Checked against float64, then timed."""
    measure(benchmark, "linear", case)
