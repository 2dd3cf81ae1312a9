"""``qengine info`` of a job file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qengine.engine.qx import write_job
from qxjobs import job_of


@pytest.mark.parametrize("name", ["job.qx", "job.safetensors"])
def test_info_tells_what_a_job_file_holds(run, tmp_path: Path, name: str) -> None:
    job = job_of()
    write_job(tmp_path / name, job)
    code, out, err = run("info", str(tmp_path / name))
    assert code == 0 and not err
    assert "Homer Simpson" in out and "<|image_pad|>x6" in out and "<|image_pad|><|image_pad|>" not in out
    assert "tensors.text.embeds F32 [11, 64]" in " ".join(out.split())
    code, out, _ = run("info", str(tmp_path / name), "--json")
    found = json.loads(out)
    assert code == 0 and found["vl"]["layers"] == [-2, -6] and set(found["tensors"]) == set(job.tensors)


def test_info_says_what_is_wrong_with_a_job_file(run, tmp_path: Path) -> None:
    path = tmp_path / "job.qx"
    write_job(path, job_of())
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = run("info", str(path))
    assert (code, out) == (3, "") and "job.qx" in err and "qengine extract" in err
    code, _, err = run("info", str(tmp_path / "none.qx"))
    assert code == 3 and "no such file" in err
