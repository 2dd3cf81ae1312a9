"""``qengine rerun`` and ``info`` read what a picture says of its making."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_engine import FINGERPRINT, read_metadata, write_picture
from PIL import Image

EDIT = [
    "edit",
    "photo.png",
    "make it grey",
    "--steps",
    "5",
    "--cfg",
    "2",
    "--size",
    "24x24",
    "--seed",
    "7",
    "-o",
    "out.png",
]


@pytest.fixture
def made(engine, run):
    """out.png, made by the fake engine, which then forgets it."""
    assert run(*EDIT)[0] == 0
    engine.opened.clear()
    engine.requests.clear()
    return engine


def change(path: str, **fields: object) -> None:
    record = read_metadata(Path(path))
    with Image.open(path) as image:
        image.load()
    write_picture(Path(path), image, {**record, **fields})


def test_X04_rerun_asks_for_the_same_again(made, run) -> None:
    code, out, _ = run("rerun", "out.png")
    assert (code, out) == (0, "out_rerun.png\n")
    request = made.request
    assert (request.prompt, request.num_inference_steps, request.true_cfg_scale) == ("make it grey", 5, 2.0)
    assert (request.size, request.seed, [str(path) for path in request.images]) == ((24, 24), 7, ["photo.png"])
    assert made.opened == [{"model": None, "offline": False, "device": "cpu", "dtype": "float32"}]
    first, again = read_metadata(Path("out.png")), read_metadata(Path("out_rerun.png"))
    assert first == again


def test_rerun_with_another_seed_changes_only_the_seed(made, run) -> None:
    assert run("rerun", "out.png", "--seed", "8", "-o", "eight.png")[0] == 0
    first, eighth = read_metadata(Path("out.png")), read_metadata(Path("eight.png"))
    assert eighth["request"].pop("seed") == 8 and first["request"].pop("seed") == 7
    assert first == eighth


def test_rerun_opens_single_files_again(engine, run) -> None:
    files = ["--dit", "d", "--vae", "v", "--text_encoder", "t", "--edit_plus"]
    assert run(*EDIT, *files)[0] == 0
    assert run("rerun", "out.png")[0] == 0
    choice = {"dit": "d", "vae": "v", "text_encoder": "t", "model_version": "edit-2509", "offline": False}
    assert engine.opened[1] == {**choice, "device": "cpu", "dtype": "float32"}


def test_rerun_finds_the_input_beside_the_picture(made, run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    shutil.move("out.png", "elsewhere/out.png")
    shutil.move("photo.png", "elsewhere/photo.png")
    assert run("rerun", "elsewhere/out.png")[0] == 0
    assert made.request.images == (Path("elsewhere/photo.png"),)


def test_rerun_refuses_a_changed_or_missing_input_and_ref_names_another(made, run) -> None:
    shutil.copy("other.png", "photo.png")
    code, _, err = run("rerun", "out.png")
    assert code == 3 and "must be the recorded one" in err and "--ref" in err
    Path("photo.png").unlink()
    code, _, err = run("rerun", "out.png")
    assert code == 3 and "got no such file" in err
    assert made.opened == []
    code, _, err = run("rerun", "out.png", "--ref", "other.png")
    assert code == 0 and "note: the pictures given by --ref are not the recorded ones" in err


def test_rerun_refuses_another_model_unless_it_is_named(made, run, folder: Path) -> None:
    made.fingerprint = "0" * 64
    code, _, err = run("rerun", "out.png")
    assert code == 4 and FINGERPRINT[:12] in err
    assert not (folder / "out_rerun.png").exists()
    assert made.closed
    assert run("rerun", "out.png", "--model", "other")[0] == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": 2}, "must have format 1, got 2"),
        ({"request": None}, "without a usable request"),
        ({"request": {}}, "without a usable content"),
        ({"kind": "dance"}, "without a usable content"),
        ({"inputs": ["photo.png"]}, "without a usable content"),
    ],
)
def test_rerun_refuses_a_damaged_record(made, run, fields: dict[str, object], words: str) -> None:
    change("out.png", **fields)
    code, _, err = run("rerun", "out.png")
    assert code == 3 and words in err


def test_rerun_and_info_refuse_a_picture_without_a_record(engine, run) -> None:
    for command in ("rerun", "info"):
        code, out, err = run(command, "photo.png")
        assert (code, out) == (3, "") and "must carry a qengine record, got none" in err
        assert run(command, "gone.png")[0] == 3


def test_info_of_a_picture_prints_its_record(made, run) -> None:
    code, out, _ = run("info", "out.png", "--json")
    assert code == 0 and json.loads(out) == read_metadata(Path("out.png"))
    code, out, _ = run("info", "out.png")
    assert code == 0 and "request.prompt" in out and "make it grey" in out


def test_info_wants_one_subject(run) -> None:
    assert run("info")[0] == 2
    assert run("info", "a", "b")[0] == 2


def test_rerun_never_overwrites_the_picture_it_reads(made, run) -> None:
    assert run("rerun", "out.png", "-o", "out.png")[0] == 2
