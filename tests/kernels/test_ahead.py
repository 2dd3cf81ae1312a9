"""Every Triton kernel compiles for every target without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from qengine.kernels import ahead

pytest.importorskip("triton")


def test_every_configuration_compiles_for_every_target_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "qengine.kernels.ahead"], capture_output=True, text=True, check=False, env=environment
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["op"] for line in lines} == set(ahead.ops()), done.stderr
    spilled = [line for line in lines if line["spill_bytes"]]
    assert not spilled
    assert done.returncode == 0, done.stderr
