"""Files that appear whole: who may read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from qengine.engine.files import write_tensors
from qengine.engine.whole import write_whole


@pytest.mark.skipif(os.name == "nt", reason="permissions of Windows are others")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_can_be_read_by_whom_the_mask_allows(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.qx", {"x": torch.ones(2)})
        write_whole(tmp_path / "b.txt", lambda path: None if path.write_text("b") else None)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.qx", "b.txt")} == {0o666 & ~mask}
