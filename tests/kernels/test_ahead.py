"""Every Triton kernel compiles for every target without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from qengine.kernels import ahead

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "targets", [(86,), pytest.param(tuple(cc for cc in ahead.TARGETS if cc != 86), marks=pytest.mark.slow)]
)
def test_every_configuration_compiles_for_a_target_without_spilling(targets: tuple[int, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qengine.kernels.ahead", "--cc", *map(str, targets)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["op"] for line in lines} == set(ahead.ops()), done.stderr
    assert {line["cc"] for line in lines} == set(targets)
    assert not [line for line in lines if line["spill_bytes"]]
    assert done.returncode == 0, done.stderr
