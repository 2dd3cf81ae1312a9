"""``extract --jobs`` fills a queue, a file per line, each what a single extract writes; and what render makes of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine.cli import extraction
from qengine.engine.given import Given
from qengine.engine.queue import JobFolder
from qengine.engine.qx import JobFile, read_job
from qengine.engine.qx import make as making
from qengine.engine.request import EditRequest
from qengine.engine.vl import Seen
from vlpipelines import picture, shared_vl
from zpipelines import build_zimage

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_zimage(tmp_path_factory.mktemp("z") / "tiny-z-image-turbo", cap_feat_dim=64))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pictures in IN/ and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    Path("IN").mkdir()
    picture(64, 48).save("IN/ref.png")
    picture(50, 40, 1).save("IN/photo.png")
    return tmp_path


@pytest.fixture
def light(place: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[EditRequest]:
    """The fake engine, and an encoder that gives the same for every edit; holds what it was asked."""
    asked: list[EditRequest] = []

    def encoded(opened: Any, request: EditRequest) -> JobFile:
        asked.append(request)
        given = Given(torch.ones(3, 8), None, (torch.zeros(1, 16, 1, 2, 2),), None, (16, 16))
        seen = (Seen("0" * 64, 16, 16),) * len(request.images)
        words = {"label": "tiny", "variant": "qwen-image-edit-2511", "fingerprint": "f", "dtype": "float32"}
        return JobFile("qwen-image-edit", None, given, request.prompt, request.negative_prompt, seen, model=words)

    assert extraction.encoded is not None, "imported before its part is replaced, and so whole for the tests after"
    monkeypatch.setattr(making, "encoded", encoded)
    return asked


def write_jobs(*jobs: dict | str, name: str = "jobs.jsonl") -> None:
    lines = [job if isinstance(job, str) else json.dumps(job) for job in jobs]
    Path(name).write_text("".join(f"{line}\n" for line in lines))


def fill(run: Run, *more: str) -> tuple[int, str, str]:
    return run("extract", "IN", "--jobs", "jobs.jsonl", "-o", "queue", *more)


def names(*states: str) -> list[str]:
    return sorted(path.stem for state in states or ("pending",) for path in Path("queue", state).glob("*.qx"))


def test_each_line_is_a_file_and_a_bad_line_fails_alone(light, run: Run) -> None:
    write_jobs(
        {"image": "ref.png", "prompt": "one", "seed": 7, "steps": 3},
        {"images": ["photo.png"], "prompt": "two", "count": 2, "output": "night.qx"},
        {"image": "ref.png", "prompt": "three"},
        "no json",
        {"image": "missing.png", "prompt": "x"},
        {"image": "ref.png", "prompt": "x", "stepz": 3},
        {"image": "ref.png", "prompt": "x", "model": "other"},
        {"image": "ref.png", "prompt": "x", "vl_model": "other"},
        {"image": "ref.png", "prompt": "x", "output": "../escape"},
        {"image": "ref.png"},
        {"image": "ref.png", "prompt": "x", "count": 0},
    )
    code, out, err = fill(run, "--model", "tiny")
    assert code == 8 and "got 8 that failed" in err and "3 made, 8 failed" in err
    assert out.split() == [f"queue/pending/{name}.qx" for name in ("ref", "night", "ref-2")]
    assert names() == ["night", "ref", "ref-2"] and not Path("escape.qx").exists()
    assert [dict(read_job(f"queue/pending/{name}.qx").render) for name in names()] == [
        {"count": 2},
        {"seed": 7, "num_inference_steps": 3},
        {},
    ]
    for words in ("jsonl:4", "no such file", "did you mean steps?", "must leave model", "leave vl_model", "plain name"):
        assert words in err


def test_resume_extracts_what_is_new_or_changed_and_nothing_twice(light, run: Run) -> None:
    jobs = [{"image": "ref.png", "prompt": "one"}, {"image": "photo.png", "prompt": "two", "alpha": 0.3}]
    write_jobs(*jobs)
    assert fill(run, "--model", "tiny")[0] == 0 and len(light) == 2
    assert fill(run, "--model", "tiny")[0] == 2
    queue = JobFolder.open(Path("queue"))
    (queue.pending / "ref.qx").rename(queue.done / "ref.qx")
    code, _, err = fill(run, "--model", "tiny", "--resume")
    assert code == 0 and len(light) == 2 and "2 kept" in err and names("pending", "done") == ["photo", "ref"]
    picture(64, 48, 5).save("IN/ref.png")
    write_jobs(*jobs, {"image": "photo.png", "prompt": "two", "alpha": 0.4}, jobs[1])
    code, _, err = fill(run, "--model", "tiny", "--resume")
    assert code == 0 and len(light) == 4 and names() == ["photo", "photo-2", "ref-2"]
    assert "asks for the same as a line before it" in err
    (queue.pending / "photo-2.qx").unlink()
    assert fill(run, "--model", "tiny", "--resume")[0] == 0 and "photo-2" in names()


def test_an_extract_that_was_killed_goes_on(light, run: Run) -> None:
    write_jobs({"image": "ref.png", "prompt": "one"})
    assert fill(run, "--model", "tiny")[0] == 0
    begun = Path("queue/manifest.jsonl").read_text().splitlines(keepends=True)[:1]
    Path("queue/manifest.jsonl").write_text("".join(begun) + '{"job": "ha')
    assert fill(run, "--model", "tiny", "--resume")[0] == 0 and len(light) == 1 and names() == ["ref"]


def test_wrong_usage_of_jobs_is_refused(light, run: Run) -> None:
    write_jobs({"image": "ref.png", "prompt": "one"})
    assert run("extract", "IN", "IN", "--jobs", "jobs.jsonl", "--model", "tiny")[0] == 2
    assert run("extract", "IN/ref.png", "--jobs", "jobs.jsonl", "--model", "tiny")[0] == 2
    assert fill(run, "--model", "tiny", "--report", "a.png")[0] == 2
    assert run("extract", "--jobs", "nothing.jsonl", "--model", "tiny")[0] == 3
    assert run("extract", "--jobs", "IN", "--model", "tiny")[0] == 2
    assert run("extract", "--jobs", "jobs.jsonl", "--model", "tiny", "-o", "s3://bucket/queue")[0] == 2
    assert not light


def test_a_queue_of_pictures_and_prompts_renders_as_single_files_do(place: Path, run: Run, model: str) -> None:
    own = {"prompt": "Homer", "alpha": 0.5, "size": [48, 32], "steps": 2}
    write_jobs(
        {"image": "ref.png", "text": "eating", "seed": 3, **own},
        {"image": "photo.png", "seed": 4, "blend": "adain_per_dim", **own},
        {"prompt": "no picture", "size": [48, 32], "steps": 1},
    )
    both = ("--vl-model", str(shared_vl()), "--model", model)
    code, _, err = fill(run, *both)
    assert code == 0 and err.count("read     1/2") == err.count("encode   1/3") == 1, err
    assert not Path("queue/reading").exists()
    single = ("--image", "IN/ref.png", "--text", "eating", "--prompt", "Homer", "--size", "48x32")
    code, _, err = run("extract", *single, "--alpha", "0.5", "--steps", "2", "--seed", "3", *both, "-o", "one.qx")
    assert code == 0, err
    one, first = read_job("one.qx"), read_job("queue/pending/ref.qx")
    assert one.tensors.keys() == first.tensors.keys() and one.render == first.render and one.blend == first.blend
    assert all(torch.equal(one.tensors[name], first.tensors[name]) for name in one.tensors)

    code, out, err = run("render", "queue", "-o", "out", "--model", model)
    assert code == 0 and out.split() == ["out/job0003.png", "out/photo.png", "out/ref.png"], err
    assert err.count("picture conditioning is experimental") == 1, "said once, not for every job"
    assert run("generate", "--conditioning", "one.qx", "--model", model, "-o", "one.png", "--seed", "3")[0] == 0
    with Image.open("one.png") as expected, Image.open("out/ref.png") as made:
        assert np.array_equal(np.asarray(expected), np.asarray(made))


@pytest.mark.slow
def test_renderers_of_a_real_model_that_are_killed_leave_what_an_unbroken_run_leaves(
    place: Path, run: Run, model: str
) -> None:
    write_jobs(*({"prompt": "Homer", "size": [48, 32], "steps": 40, "seed": seed} for seed in range(8)))
    for queue in ("queue", "whole"):
        code, _, err = run("extract", "IN", "--jobs", "jobs.jsonl", "-o", queue, "--model", model)
        assert code == 0, err
    words = [sys.executable, "-m", "qengine.cli", "render", "--model", model, "-q", "-o"]
    roots = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(out: str, queue: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": roots}
        return subprocess.Popen([*words, out, queue], env=environment, stdout=subprocess.DEVNULL)

    assert start("unbroken", "whole").wait() == 0
    queue, chance, kills = JobFolder.open(Path("queue")), random.Random(1), 0
    workers = [start("out", "queue"), start("out", "queue")]
    while kills < 5 and len(names("done")) < 7:
        at_work = {worker for worker, _ in queue.taken()}
        victims = [number for number, each in enumerate(workers) if any(f"-{each.pid}-" in name for name in at_work)]
        if victims:
            time.sleep(chance.uniform(0, 0.5))
            workers[victims[0]].kill()
            assert workers[victims[0]].wait() in (-9, 1)
            workers[victims[0]] = start("out", "queue")
            kills += 1
        time.sleep(0.02)
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert kills and names("pending", "failed") == [] and len(names("done")) == 8
    assert not list(Path("queue").rglob("*.part")) and not list(Path("out").rglob("*.part"))
    for path in sorted(Path("unbroken").glob("*.png")):
        with Image.open(path) as expected, Image.open(Path("out", path.name)) as made:
            assert np.array_equal(np.asarray(expected), np.asarray(made)), path
