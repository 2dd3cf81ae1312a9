"""``qengine batch``: every job is done or told, nothing is done twice, and a killed batch goes on."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import read_metadata
from PIL import Image
from qengine.errors import InputError

SCRIPT = Path(__file__).parent / "fake_engine.py"
KILLS = 200


def write_jobs(path: Path, *jobs: dict) -> str:
    path.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return str(path)


def manifest(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "manifest.jsonl").read_text().splitlines()]


def test_E20_a_folder_of_pictures_with_one_prompt_and_one_engine(engine, run) -> None:
    Path("photos").mkdir()
    for name in ("b.png", "a.png"):
        Image.new("RGB", (8, 8)).save(Path("photos", name))
    code, out, _ = run("batch", "photos", "-p", "make it gray", "-o", "gray", "--seed", "5")
    assert code == 0 and out.split() == ["gray/a_edited.png", "gray/b_edited.png"]
    assert len(engine.opened) == 1 and engine.closed
    assert [request.prompt for request in engine.requests] == ["make it gray"] * 2
    assert [request.images[0].name for request in engine.encoded] == ["a.png", "b.png"]
    assert [line["state"] for line in manifest("gray")] == ["begun", "done"] * 2


def test_json_lines_override_what_the_command_line_says(engine, run) -> None:
    jobs = write_jobs(
        Path("jobs.jsonl"),
        {"images": ["photo.png"], "prompt": "one", "seed": 7},
        {"images": ["other.png", "photo.png"], "steps": 3, "output": "deeper/two.png"},
        {"image": "photo.png"},
    )
    assert run("batch", jobs, "-p", "common", "--steps", "9", "-o", "out")[0] == 0
    asked = [(r.prompt, r.num_inference_steps, r.seed, len(r.images)) for r in engine.requests]
    assert asked == [("one", 9, 7, 1), ("common", 3, 0, 2), ("common", 9, 0, 1)]
    assert sorted(str(p.relative_to("out")) for p in Path("out").rglob("*.png")) == [
        "deeper/two.png",
        "photo_edited-2.png",
        "photo_edited.png",
    ]


def test_M45_a_text_file_of_prompts_with_overrides(engine, run) -> None:
    Path("prompts.txt").write_text(
        "# colours\nmake it red --ci photo.png --d 3 --s 4\nblue --ci other.png --w 64 --h 32\n"
    )
    assert run("batch", "prompts.txt", "-o", "out")[0] == 0
    assert [(r.prompt, r.seed, r.size) for r in engine.requests] == [("make it red", 3, None), ("blue", 0, (64, 32))]


def test_one_bad_input_does_not_stop_the_rest_and_the_exit_code_is_8(engine, run) -> None:
    Path("broken.png").write_bytes(b"no picture")
    jobs = write_jobs(
        Path("jobs.jsonl"),
        {"image": "missing.png", "prompt": "x"},
        {"image": "broken.png", "prompt": "x"},
        {"image": "photo.png", "prompt": "x", "steps": 0},
        {"image": "photo.png", "prompt": "x", "model": "other"},
        {"image": "photo.png", "prompt": "x", "output": "../escape.png"},
        {"image": "photo.png"},
        {"image": "photo.png", "prompt": "good"},
    )
    code, out, err = run("batch", jobs, "-o", "out")
    assert code == 8
    assert out.split() == ["out/photo_edited.png"]
    assert [line["state"] for line in manifest("out")].count("failed") == 6
    for words in ("no such file", "must be a picture", "num_inference_steps", "must leave model", "inside the folder"):
        assert words in err
    assert "jobs.jsonl:6" in err and "got 6 that failed" in err
    assert not Path("escape.png").exists()


def test_a_job_that_fails_in_the_engine_is_told_and_tried_again_on_resume(engine, run) -> None:
    engine.error = InputError("photo.png must be lucky, got none")
    assert run("batch", ".", "-p", "x", "-o", "out")[0] == 8
    told = [line["error"] for line in manifest("out") if line["state"] == "failed"]
    assert told == ["photo.png must be lucky, got none"] * 2
    engine.error = None
    assert run("batch", ".", "-p", "x", "-o", "out")[0] == 2
    assert run("batch", ".", "-p", "x", "-o", "out", "--resume")[0] == 0
    assert len(list(Path("out").glob("*.png"))) == 2


def test_resume_does_only_what_is_missing_changed_or_lost(engine, run) -> None:
    assert run("batch", ".", "-p", "x", "-o", "out")[0] == 0
    done = len(engine.requests)
    code, _, err = run("batch", ".", "-p", "x", "-o", "out", "--resume")
    assert code == 0 and len(engine.requests) == done and "kept" in err
    Path("out/photo_edited.png").unlink()
    Image.new("RGB", (5, 5)).save("other.png")
    assert run("batch", ".", "-p", "x", "-o", "out", "--resume")[0] == 0
    assert [request.images[0].name for request in engine.requests[done:]] == ["other.png", "photo.png"]


def test_a_word_that_the_parser_refuses_fails_its_job_alone(engine, run) -> None:
    jobs = write_jobs(
        Path("jobs.jsonl"),
        {"image": "photo.png", "prompt": "x", "steps": "many"},
        {"image": "photo.png", "prompt": "x", "weights": "int8"},
        {"image": "photo.png", "prompt": "x", "attn_mode": "math"},
        {"image": "photo.png", "prompt": "good"},
    )
    code, out, err = run("batch", jobs, "-o", "out")
    assert code == 8 and out.split() == ["out/photo_edited.png"]
    assert "many" in err and "must leave weights" in err and "must leave attn_mode" in err


def test_inputs_and_files_of_others_are_never_overwritten(engine, run) -> None:
    before = Path("photo.png").read_bytes()
    jobs = write_jobs(Path("jobs.jsonl"), {"image": "photo.png", "prompt": "x", "output": "photo.png"})
    code, _, err = run("batch", jobs, "-o", ".")
    assert code == 8 and "must differ from the input pictures" in err and Path("photo.png").read_bytes() == before
    Path("mine").mkdir()
    Path("mine/photo_edited.png").write_bytes(b"mine")
    code, _, err = run("batch", ".", "-p", "x", "-o", "mine")
    assert code == 8 and "must be a new file" in err
    assert Path("mine/photo_edited.png").read_bytes() == b"mine" and Path("mine/other_edited.png").exists()


def test_a_changed_mask_is_another_job(engine, run) -> None:
    Image.new("L", (40, 20), 255).save("mask.png")
    jobs = write_jobs(Path("jobs.jsonl"), {"image": "photo.png", "prompt": "x", "mask": "mask.png"})
    assert run("batch", jobs, "-o", "out")[0] == 0
    assert run("batch", jobs, "-o", "out", "--resume")[0] == 0 and len(engine.requests) == 1
    Image.new("L", (40, 20), 128).save("mask.png")
    assert run("batch", jobs, "-o", "out", "--resume")[0] == 0 and len(engine.requests) == 2


def test_a_cut_last_line_of_the_manifest_is_dropped(engine, run) -> None:
    assert run("batch", ".", "-p", "x", "-o", "out")[0] == 0
    with Path("out/manifest.jsonl").open("a") as file:
        file.write('{"job": "abc", "sta')
    assert run("batch", ".", "-p", "x", "-o", "out", "--resume")[0] == 0
    assert len(manifest("out")) == 4


def test_lines_that_are_typed_run_as_they_come(engine, run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("first --ci photo.png\nwrong --zz 1\n\nsecond --ci other.png --d 9\n")
    )
    code, out, err = run("batch", "-", "-o", "typed")
    assert code == 0 and out.split() == ["typed/photo_edited.png", "typed/other_edited.png"]
    assert "line 2" in err and len(engine.opened) == 1
    assert read_metadata(Path("typed/other_edited.png"))["request"]["seed"] == 9


def test_several_seeds_of_a_job_are_several_results(engine, run) -> None:
    assert run("batch", "photo.png", "-p", "x", "-o", "out")[0] == 3
    write_jobs(Path("jobs.jsonl"), {"image": "photo.png", "prompt": "x", "count": 2, "seed": 4})
    assert run("batch", "jobs.jsonl", "-o", "out")[0] == 0
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["photo_edited_4.png", "photo_edited_5.png"]


def test_nothing_to_do_and_wrong_usage_are_refused(engine, run) -> None:
    Path("empty").mkdir()
    assert run("batch", "empty", "-p", "x")[0] == 3
    assert run("batch", "-p", "x")[0] == 2
    assert run("batch", ".", ".", "-p", "x")[0] == 2
    assert run("batch", ".", "-p", "x", "-o", "photo.png")[0] == 3
    assert not engine.opened


def test_E13_cost_is_seconds_times_rate(engine, run) -> None:
    code, out, err = run("edit", "photo.png", "x", "-o", "a.png", "--cost-per-hour", "0.34", "--json")
    made = json.loads(out)["outputs"][0]
    assert code == 0
    assert made["cost"] == pytest.approx(made["seconds"] * 0.34 / 3600, abs=0.34 * 0.001 / 3600)
    assert "per 1000, at 0.34 per hour" in err
    assert run("edit", "photo.png", "x", "--cost-per-hour", "-1")[0] == 2


def start(folder: Path) -> subprocess.Popen:
    words = ["batch", "photos", "-p", "x", "-o", "out", "--resume", "-q"]
    environment = {**os.environ, "QENGINE_FAKE_PHASE_SECONDS": "0.002", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([sys.executable, SCRIPT, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.suffix == ".png"}


@pytest.mark.slow
def test_200_kills_at_random_moments_leave_what_an_unbroken_run_leaves(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        (folder / "photos").mkdir(parents=True)
        for number in range(25):
            Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(folder / "photos" / f"{number:02d}.png")
    begun = time.monotonic()
    assert start(whole).wait() == 0
    seconds = time.monotonic() - begun
    chance, kills, rounds = random.Random(0), 0, 0
    while kills < KILLS:
        process = start(broken)
        try:
            assert process.wait(timeout=chance.uniform(0.3 * seconds, 1.1 * seconds)) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if len(contents(broken / "out")) == 25 and kills < KILLS:
            rounds += 1
            assert contents(broken / "out") == contents(whole / "out")
            for path in (broken / "out").iterdir():
                path.unlink()
    assert start(broken).wait() == 0
    assert contents(broken / "out") == contents(whole / "out") and rounds
    assert not list((broken / "out").rglob("*.part"))
    lines = (broken / "out" / "manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["state"] for line in lines} == {"begun", "done"}
