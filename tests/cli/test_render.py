"""``qengine render``: every job once, whoever dies; what cannot be done is told and set aside."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from fake_render import prepare, read_job
from PIL import Image
from qengine.cli import render
from qengine.engine.queue import JobFolder
from qengine.errors import InputError, KernelError, OutputError

SCRIPT = Path(__file__).parent / "fake_render.py"
KILLS = 20
KILLED = (-9, 1)
"""Exit codes of a process that was killed, here and on Windows."""
JOBS = 30


@pytest.fixture
def fake(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(render, "read_job", read_job)
    monkeypatch.setattr(render, "prepare", prepare)
    monkeypatch.setattr(render, "POLL_SECONDS", 0.01)
    return engine


def fill(root: Path, jobs: dict[str, dict]) -> JobFolder:
    queue = JobFolder.make(root)
    for name, job in jobs.items():
        (queue.pending / f"{name}.qx").write_text(json.dumps({"prompt": "x", **job}))
    return queue


def manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_queue_is_worked_off_with_one_engine(fake, run) -> None:
    queue = fill(Path("queue"), {"b": {"seed": 7}, "a": {"size": None}, "many": {"count": 2, "seed": 3}})
    code, out, err = run("render", "queue", "-o", "out", "--model", "z")
    assert code == 0 and out.split() == ["out/a.png", "out/b.png", "out/many_3.png", "out/many_4.png"]
    assert len(fake.opened) == 1 and fake.closed and "4 done" in err
    assert [request.seed for request in fake.requests] == [0, 7, 3, 4]
    assert queue.counts() == {"pending": 0, "claimed": 0, "done": 3, "failed": 0}
    assert [line["state"] for line in manifest(Path("out"))] == ["begun", "done"] * 4
    assert run("render", "queue", "-o", "out", "--model", "z")[0] == 0 and len(fake.requests) == 4


def test_the_command_line_holds_over_every_job(fake, run) -> None:
    fill(Path("queue"), {"a": {"seed": 7, "num_inference_steps": 4}})
    assert run("render", "queue", "-o", "out", "--steps", "2", "--seed", "9", "--size", "64x32")[0] == 0
    assert (fake.request.num_inference_steps, fake.request.seed, fake.request.size) == (2, 9, (64, 32))


def test_a_bad_job_file_fails_alone_and_its_text_says_why(fake, run) -> None:
    queue = fill(Path("queue"), {"good": {}, "wrong": {"steps": 1, "num_inference_steps": 0}})
    (queue.pending / "cut.qx").write_text("{")
    (queue.pending / "zero.qx").write_text(json.dumps({"prompt": "x", "num_inference_steps": 0}))
    (queue.pending / "wrong.qx").unlink()
    code, out, err = run("render", "queue", "-o", "out")
    assert code == 8 and out.split() == ["out/good.png"] and "got 2 that failed" in err
    assert sorted(path.name for path in queue.failed.iterdir()) == ["cut.qx", "cut.txt", "zero.qx", "zero.txt"]
    assert "must be a job file" in (queue.failed / "cut.txt").read_text()
    assert [line["where"] for line in manifest(Path("out")) if line["state"] == "failed"] == ["cut", "zero"]


def test_a_job_that_fails_in_the_engine_is_tried_three_times(fake, run) -> None:
    queue = fill(Path("queue"), {"a": {}})
    fake.error = KernelError("a step must be finite, got NaN")
    code, _, err = run("render", "queue", "-o", "out")
    assert code == 8 and len(fake.requests) == 3 and err.count("it goes back to the queue") == 2
    assert (queue.failed / "a.txt").read_text().count("got NaN") == 3
    fake.error = None
    (queue.failed / "a.qx").rename(queue.pending / "a.qx")
    assert run("render", "queue", "-o", "out")[0] == 0 and not list(queue.failed.iterdir())


def test_a_job_for_another_model_stays_in_the_queue(fake, run) -> None:
    queue = fill(Path("queue"), {"a": {"model": "qwen"}, "b": {"model": "z"}})
    code, out, err = run("render", "queue", "-o", "out", "--model", "z")
    assert code == 8 and out.split() == ["out/b.png"] and "a stays in the queue" in err
    assert queue.waiting() == ["a"] and not list(queue.failed.iterdir())
    assert run("render", "queue", "-o", "out", "--model", "qwen")[0] == 0 and Path("out/a.png").exists()


def test_what_stops_the_worker_gives_the_job_back(fake, run, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = fill(Path("queue"), {"a": {}, "b": {}})
    fake.error = OutputError("out must be writable, got: no space left")
    assert run("render", "queue", "-o", "out")[0] == 3 and queue.waiting() == ["a", "b"]
    fake.error = RuntimeError("unforeseen")
    assert run("render", "queue", "-o", "out")[0] == 1 and queue.waiting() == ["a", "b"]
    assert "unforeseen" in (queue.failed / "b.txt").read_text(), "a had failed, so b came first"
    fake.error = KeyboardInterrupt()
    assert run("render", "queue", "-o", "out")[0] == 130 and queue.waiting() == ["a", "b"]
    assert fake.cancelled

    def broken(*_: object, **__: object) -> None:
        raise InputError("the model must be there, got none")

    monkeypatch.setattr(render, "open_engine", broken)
    assert run("render", "queue", "-o", "out")[0] == 3 and queue.waiting() == ["a", "b"], "it is not the jobs' fault"


def test_a_picture_that_was_written_before_its_worker_died_is_kept(fake, run) -> None:
    queue = fill(Path("queue"), {"a": {}})
    assert run("render", "queue", "-o", "out")[0] == 0
    (queue.done / "a.qx").rename(queue.pending / "a.qx")
    lines = Path("out/manifest.jsonl").read_text().splitlines(keepends=True)
    Path("out/manifest.jsonl").write_text(lines[0])
    before = Path("out/a.png").stat().st_mtime_ns
    code, _, err = run("render", "queue", "-o", "out")
    assert code == 0 and "kept" in err and len(fake.requests) == 1 and queue.counts()["done"] == 1
    assert Path("out/a.png").stat().st_mtime_ns == before
    assert [line["state"] for line in manifest(Path("out"))] == ["begun", "done"]


def test_files_of_others_are_never_overwritten(fake, run) -> None:
    queue = fill(Path("queue"), {"a": {}})
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"mine")
    code, _, err = run("render", "queue", "-o", "out")
    assert code == 8 and "must be a new file" in err and Path("out/a.png").read_bytes() == b"mine"
    assert queue.counts()["failed"] == 1


def test_wrong_usage_is_refused(fake, run) -> None:
    fill(Path("queue"), {})
    assert run("render")[0] == 2
    assert run("render", "queue", "queue")[0] == 2
    assert run("render", "queue", "--lease", "0")[0] == 2
    assert run("render", "nowhere")[0] == 3
    assert run("render", "queue", "-o", "photo.png")[0] == 3
    assert run("render", "queue", "-o", "./queue")[0] == 2
    code, _, err = run("render", "queue")
    assert code == 0 and "nothing to do" in err and not fake.opened


def start(folder: Path, *more: str, seconds: str = "0.004") -> subprocess.Popen:
    words = ["render", "queue", "-o", "out", "-q", *more]
    environment = {**os.environ, "QENGINE_FAKE_PHASE_SECONDS": seconds, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, SCRIPT, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def numbered(folder: Path) -> JobFolder:
    return fill(folder / "queue", {f"{number:02d}": {"seed": number} for number in range(JOBS)})


def check_whole(folder: Path, queue: JobFolder) -> None:
    """Every picture is there, whole and its own; every job is done; every result was said to be done once."""
    assert queue.counts() == {"pending": 0, "claimed": 0, "done": JOBS, "failed": 0}
    pictures = sorted((folder / "out").glob("*.png"))
    assert [path.stem for path in pictures] == [f"{number:02d}" for number in range(JOBS)]
    for path in pictures:
        with Image.open(path) as image:
            assert image.getpixel((0, 0)) == (int(path.stem),) * 3
    done = [line["where"] for line in manifest(folder / "out") if line["state"] == "done"]
    assert sorted(done) == [path.stem for path in pictures]
    assert not list((folder / "out").glob(".*.part")) and not list((folder / "queue").rglob("*.part"))


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_at_once_do_every_job_once(tmp_path: Path, workers: int) -> None:
    queue = numbered(tmp_path)
    processes = [start(tmp_path) for _ in range(workers)]
    assert [process.wait(timeout=60) for process in processes] == [0] * workers
    check_whole(tmp_path, queue)
    begun = [line["where"] for line in manifest(tmp_path / "out") if line["state"] == "begun"]
    assert len(begun) == JOBS, "nothing was begun twice"


def test_20_kills_at_random_moments_lose_no_job_and_make_none_twice(tmp_path: Path) -> None:
    queue = numbered(tmp_path)
    chance, kills = random.Random(0), 0
    workers = [start(tmp_path), start(tmp_path)]
    while kills < KILLS:
        time.sleep(chance.uniform(0.1, 0.6))
        number = chance.randrange(2)
        if workers[number].poll() is None:
            workers[number].kill()
            kills += 1
        assert workers[number].wait(timeout=60) in (0, *KILLED)
        if queue.counts()["done"] == JOBS:
            assert workers[1 - number].wait(timeout=60) == 0
            check_whole(tmp_path, queue)
            for path in queue.done.iterdir():
                path.rename(queue.pending / path.name)
            for path in (tmp_path / "out").iterdir():
                path.unlink()
            workers[1 - number] = start(tmp_path)
        workers[number] = start(tmp_path)
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0]
    check_whole(tmp_path, queue)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
def test_ctrl_c_gives_the_job_back(tmp_path: Path) -> None:
    queue = fill(tmp_path / "queue", {"a": {}})
    process = start(tmp_path, seconds="20")
    while not list(queue.taken()):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and queue.waiting() == ["a"] and not list(queue.claimed.iterdir())


def test_a_watching_worker_does_what_comes_later_and_a_waiting_one_takes_over(tmp_path: Path) -> None:
    queue = fill(tmp_path / "queue", {"a": {}})
    slow = start(tmp_path, seconds="20")
    while not list(queue.taken()):
        time.sleep(0.02)
    waiting = start(tmp_path, "--watch")
    time.sleep(0.5)
    assert list(queue.taken())[0][1] == "a" and waiting.poll() is None
    slow.kill()
    slow.wait(timeout=30)
    (queue.pending / "b.qx").write_text(json.dumps({"prompt": "x"}))
    begun = time.monotonic()
    while queue.counts()["done"] < 2 and time.monotonic() < begun + 60:
        time.sleep(0.02)
    waiting.kill()
    waiting.wait(timeout=30)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["a.png", "b.png"]
