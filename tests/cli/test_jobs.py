"""Files of jobs: every line becomes the words of a command line, or an error with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qengine.cli.jobs import Job, lines_of, prompt_words, read_jobs
from qengine.cli.options import EDIT_SECTIONS, flags_by_spelling
from qengine.errors import InputError, RequestError

FLAGS = flags_by_spelling(EDIT_SECTIONS.values())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a red car", ["--prompt=a red car"]),
        ("a red car --w 512 --h 768", ["--prompt=a red car", "--size=512x768"]),
        ("x --d 42 --s 20 --g 4", ["--prompt=x", "--seed=42", "--steps=20", "--true-cfg-scale=4"]),
        ("x --l 3.5", ["--prompt=x", "--true-cfg-scale=3.5"]),
        ("x --fs 2.2 --n ugly, blurred", ["--prompt=x", "--flow-shift=2.2", "--negative-prompt=ugly, blurred"]),
        ("x --ci a b.png --ci c.png", ["--prompt=x", "--ref=a b.png", "--ref=c.png"]),
        ("x --negative_prompt y", ["--prompt=x", "--negative-prompt=y"]),
        ("--ci a.png --n -5 degrees", ["--ref=a.png", "--negative-prompt=-5 degrees"]),
        ("half -- of it", ["--prompt=half -- of it"]),
    ],
)
def test_M45_a_prompt_line_with_overrides(line: str, words: list[str]) -> None:
    assert prompt_words(line, FLAGS) == words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("x --w 512", "--w and --h must be given together"),
        ("x --zz 3", "got 'zz'"),
        ("x --d", "--seed must have a value"),
    ],
)
def test_M45_a_line_that_cannot_be_read_says_why(line: str, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        prompt_words(line, FLAGS)


def test_json_lines_take_every_option_by_name() -> None:
    line = json.dumps({"prompt": "x", "images": ["a.png", "b.png"], "seed": 7, "size": [64, 32], "output": "one.png"})
    (job,) = lines_of(line, "jobs", FLAGS, as_json=True)
    assert job.words == ("--prompt=x", "--ref=a.png", "--ref=b.png", "--seed=7", "--size=64x32")
    assert job.output == "one.png" and job.number == 1 and job.where == "jobs:1"
    (switch,) = lines_of('{"no_metadata": true, "json": false, "steps": null}', "jobs", FLAGS, as_json=True)
    assert switch.words == ("--no-metadata",)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"prompt": {"a": 1}}', '{"sneed": 1}', '{"output": 3}', '{"no_metadata": "x"}']
)
def test_a_bad_json_line_is_a_job_with_an_error_and_the_others_stand(line: str) -> None:
    jobs = list(lines_of('{"prompt": "a"}\n# a comment\n\n' + line + '\n{"prompt": "b"}', "f", FLAGS, as_json=True))
    assert [job.where for job in jobs] == ["f:1", "f:4", "f:5"]
    assert [job.error is None for job in jobs] == [True, False, True]
    assert jobs[1].words == ()


def test_a_folder_gives_a_job_per_picture_in_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deeper.png").mkdir()
    assert read_jobs(tmp_path, FLAGS) == [
        Job(1, str(tmp_path / "a.JPG"), ("--ref", str(tmp_path / "a.JPG"))),
        Job(2, str(tmp_path / "b.png"), ("--ref", str(tmp_path / "b.png"))),
    ]


def test_an_empty_folder_an_empty_file_no_file_and_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder with pictures in it, got none"):
        read_jobs(tmp_path, FLAGS)
    (tmp_path / "jobs.txt").write_text("# nothing\n\n")
    with pytest.raises(InputError, match="a job in each line, got none"):
        read_jobs(tmp_path / "jobs.txt", FLAGS)
    with pytest.raises(InputError, match="got no such file"):
        read_jobs(tmp_path / "other.jsonl", FLAGS)
    (tmp_path / "jobs.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="readable as UTF-8"):
        read_jobs(tmp_path / "jobs.jsonl", FLAGS)
