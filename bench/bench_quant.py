"""Row quantisation, beside a plain torch program and the bandwidth of the machine."""

from __future__ import annotations

from typing import Any

import pytest
from qengine.bench.ops import listed, measure


@pytest.mark.parametrize("case", listed("quant"))
def test_quant(benchmark: Any, case: str) -> None:
    """Compared byte for byte with the definition, then timed."""
    measure(benchmark, "quant", case)
