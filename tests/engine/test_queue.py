"""A queue of jobs: every job once, nothing lost with a worker, nothing begun where something else lies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from qengine.engine.queue import JobFolder, Ledger, Worker
from qengine.errors import InputError, OutputError, RequestError


@pytest.fixture
def queue(tmp_path: Path) -> JobFolder:
    folder = JobFolder.make(tmp_path / "queue")
    for name in ("a", "b", "c"):
        (folder.pending / f"{name}.qx").write_text(name)
    (folder.pending / ".d.qx.1234.part").write_text("half")
    return folder


def test_a_claim_is_one_rename_and_a_job_goes_through_the_folders(queue: JobFolder) -> None:
    with Worker(queue) as worker:
        claim = worker.claim()
        assert claim is not None and claim.name == "a" and claim.path.read_text() == "a"
        assert list(queue.taken()) == [(worker.name, "a")] and queue.waiting() == ["b", "c"] and queue.holds("a")
        assert worker.finish(claim) and (queue.done / "a.qx").read_text() == "a" and not claim.held
        assert not worker.finish(claim)
        second = worker.claim()
        assert second is not None and worker.give_back(second) and queue.waiting() == ["b", "c"]
        assert queue.counts() == {"pending": 2, "claimed": 0, "done": 1, "failed": 0}
    assert not list(queue.workers.glob("*.json")) and not list(queue.claimed.iterdir())


def test_what_a_worker_holds_at_its_end_goes_back(queue: JobFolder) -> None:
    with Worker(queue) as worker:
        assert worker.claim() and worker.claim() and queue.waiting() == ["c"]
    assert queue.waiting() == ["a", "b", "c"]


def test_four_workers_at_once_get_every_job_once(tmp_path: Path) -> None:
    queue = JobFolder.make(tmp_path / "queue")
    names = [f"{number:03d}" for number in range(120)]
    for name in names:
        (queue.pending / f"{name}.qx").write_text(name)
    got: list[list[str]] = [[], [], [], []]

    def work(mine: list[str]) -> None:
        with Worker(queue) as worker:
            while (claim := worker.claim()) is not None:
                mine.append(claim.path.read_text())
                assert worker.finish(claim)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for mine in got for name in mine) == names
    assert queue.counts() == {"pending": 0, "claimed": 0, "done": 120, "failed": 0}


def test_a_live_worker_of_this_machine_keeps_its_job_and_a_dead_one_loses_it_at_once(queue: JobFolder) -> None:
    dead = Worker(queue)
    dead.__enter__()
    held = dead.claim()
    with Worker(queue) as other:
        assert other.recover() == [] and other.others() == 1
        dead._lock.release()  # as the system does when the process is killed
        assert held is not None and other.recover() == ["a"] and not held.held
        assert other.others() == 0 and queue.waiting() == ["a", "b", "c"]
        assert not list(queue.workers.glob(f"{dead.name}.*")), "nothing is left of it"
    dead.__exit__()


def test_a_worker_of_another_machine_loses_its_job_when_its_heartbeat_has_stood_still(queue: JobFolder) -> None:
    now = [0.0]
    far = queue.claimed / "far-1-abcd"
    far.mkdir()
    (queue.pending / "a.qx").rename(far / "a.qx")
    pulse = queue.workers / "far-1-abcd.json"
    pulse.write_text(json.dumps({"host": "far", "lease": 10, "beat": "1"}))
    with Worker(queue, lease_seconds=5, clock=lambda: now[0]) as worker:
        assert worker.recover() == []
        now[0] = 9.0
        pulse.write_text(json.dumps({"host": "far", "lease": 10, "beat": "2"}))
        assert worker.recover() == []
        now[0] = 18.9
        assert worker.recover() == [], "its own lease is the longer one"
        now[0] = 19.1
        assert worker.recover() == ["a"] and queue.waiting() == ["a", "b", "c"] and not far.exists()


def test_a_live_worker_gives_signs_all_the_time(queue: JobFolder) -> None:
    with Worker(queue, lease_seconds=0.04) as worker:
        (path,) = queue.workers.glob("*.json")
        assert path.stem == worker.name
        first = path.read_text()
        while path.read_text() == first:
            pass
    assert not path.exists()


def test_a_worker_without_a_word_about_itself_has_the_lease_too(queue: JobFolder) -> None:
    now = [0.0]
    lost = queue.claimed / "lost"
    lost.mkdir()
    (queue.pending / "a.qx").rename(lost / "a.qx")
    with Worker(queue, lease_seconds=5, clock=lambda: now[0]) as worker:
        assert worker.recover() == []
        now[0] = 6.0
        assert worker.recover() == ["a"]


def test_a_job_that_fails_three_times_is_given_up_and_its_text_says_why(queue: JobFolder) -> None:
    for name in ("b", "c"):
        (queue.pending / f"{name}.qx").unlink()
    with Worker(queue) as worker:
        for attempt in (1, 2, 3):
            claim = worker.claim()
            assert claim is not None and claim.name == "a"
            assert worker.fail(claim, f"it must work,\ngot attempt {attempt}", final=False) is (attempt == 3)
        lines = (queue.failed / "a.txt").read_text().splitlines()
        assert [line.split(": ")[1] for line in lines] == [f"it must work, got attempt {n}" for n in (1, 2, 3)]
        assert (queue.failed / "a.qx").read_text() == "a" and queue.waiting() == []
        (queue.pending / "b.qx").write_text("b")
        claim = worker.claim()
        assert claim is not None and worker.fail(claim, "bad file", final=True) and queue.waiting() == []


def test_a_job_whose_workers_die_ten_times_is_given_up_and_lets_others_go_first(queue: JobFolder) -> None:
    with Worker(queue) as worker:
        for deaths in range(1, 11):
            dead = Worker(queue)
            dead.__enter__()
            (dead.queue.claimed / dead.name).mkdir()
            (queue.pending / "a.qx").rename(dead.queue.claimed / dead.name / "a.qx")
            dead._lock.release()  # as the system does when the process is killed
            assert worker.recover() == ["a"] and ("a" in queue.waiting()) is (deaths < 10)
            dead.__exit__()
            if deaths == 1:
                claim = worker.claim()
                assert claim is not None and claim.name == "b" and worker.give_back(claim)
        assert (queue.failed / "a.qx").exists() and queue.waiting() == ["b", "c"]
        assert (queue.failed / "a.txt").read_text().count("its worker died") == 10


def test_a_job_that_is_done_after_all_leaves_no_text_of_failure(queue: JobFolder) -> None:
    with Worker(queue) as worker:
        claim = worker.claim()
        assert claim is not None and not worker.fail(claim, "once", final=False)
        names = []
        while (claim := worker.claim()) is not None:
            names.append(claim.name)
            assert worker.finish(claim)
        assert names == ["b", "c", "a"], "a job that failed comes after the others"
    assert not list(queue.failed.iterdir())


def test_a_lost_job_is_neither_finished_nor_failed_by_the_one_who_lost_it(queue: JobFolder) -> None:
    with Worker(queue) as worker:
        claim = worker.claim()
        assert claim is not None
        claim.path.rename(queue.pending / "a.qx")
        assert not worker.finish(claim) and not worker.fail(claim, "late", final=True)
        assert queue.waiting() == ["a", "b", "c"] and not list(queue.failed.iterdir())


def test_only_a_queue_is_opened(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="must be a queue"):
            JobFolder.open(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="got a file"):
        JobFolder.open(tmp_path / "file")
    with pytest.raises(OutputError):
        JobFolder.make(tmp_path / "file")


def test_a_result_that_was_written_before_its_worker_died_is_not_made_again(tmp_path: Path) -> None:
    picture = tmp_path / "out" / "a.png"
    ledger = Ledger(picture.parent)
    assert ledger.begin("key", [picture])
    assert Ledger(picture.parent).begin("key", [picture]), "nothing was written"
    picture.write_bytes(b"whole")
    assert not Ledger(picture.parent).begin("key", [picture])
    states = [json.loads(line)["state"] for line in ledger.path.read_text().splitlines()]
    assert states == ["begun", "begun", "done"]
    assert not ledger.begin("key", [picture]), "what others wrote is seen"
    picture.unlink()
    assert ledger.begin("key", [picture]), "what was lost is made again"


def test_nothing_is_begun_where_something_else_lies(tmp_path: Path) -> None:
    ledger, picture = Ledger(tmp_path), tmp_path / "a.png"
    picture.write_bytes(b"mine")
    with pytest.raises(RequestError, match="must be a new file"):
        ledger.begin("key", [picture])
    assert picture.read_bytes() == b"mine"


def test_a_line_that_a_kill_cut_is_dropped_and_the_others_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.end("one", [tmp_path / "1.png"])
    with ledger.path.open("a") as file:
        file.write('{"job": "tw')
    Ledger(tmp_path).end("three", [tmp_path / "3.png"])
    assert [json.loads(line)["job"] for line in ledger.path.read_text().splitlines()] == ["one", "three"]
