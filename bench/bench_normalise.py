"""Outlier mask and normalisation of embeddings, beside a plain torch program and the copy bandwidth of the machine."""

from __future__ import annotations

from typing import Any

import pytest
from qengine.bench.ops import listed, measure


@pytest.mark.parametrize("case", listed("normalise"))
def test_normalise(benchmark: Any, case: str) -> None:
    """Checked against float64, then timed."""
    measure(benchmark, "normalise", case)
