"""``qengine pack`` and ``--packed``, with the model inside qengine."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qengine.loaders.source import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

EDIT = ["edit", "photo.png", "make it grayscale", "--size", "64x48", "--steps", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(folder / "cache"))


def pack(run, *words: str) -> Path:
    code, out, err = run("pack", "tiny", "--device", "cpu", *words)
    assert code == 0, err
    return Path(out.strip())


def left(folder: Path) -> list[str]:
    """Files that are not the photos."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".png")


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
def test_M24_what_is_packed_into_the_cache_is_what_the_next_run_uses(run, weights: str) -> None:
    code, out, err = run("pack", "tiny", "--weights", weights, "--component", "both", "--device", "cpu")
    paths = [Path(line) for line in out.splitlines()]
    assert code == 0 and len(paths) == 2 and all(path.parent == Path("cache/packed").resolve() for path in paths), err
    assert err.count("pack ") == 2 and "the next run finds it there" in err
    before = {path: path.stat().st_mtime_ns for path in paths}
    code, _, err = run(*EDIT, "--weights", weights, "-o", "out.png")
    assert code == 0 and "pack " not in err
    assert {path: path.stat().st_mtime_ns for path in Path("cache/packed").resolve().iterdir()} == before


def test_M24_a_packed_file_given_by_name_brings_its_format_along(run) -> None:
    path = pack(run, "--weights", "int8", "-o", "tiny.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["qengine.format"] == "int8" and file.metadata()["qengine.plain"] == "F32"
    flags = ["--text-encoder-weights", "bf16"]
    code, _, err = run(*EDIT, *flags, "--packed", str(path), "-o", "a.png")
    assert code == 0 and "pack " not in err
    assert run(*EDIT, *flags, "--weights", "int8", "-o", "b.png")[0] == 0
    with Image.open("a.png") as first, Image.open("b.png") as second:
        assert (np.asarray(first) == np.asarray(second)).all()


def test_the_compute_dtype_is_part_of_the_file(run) -> None:
    path = pack(run, "--weights", "int8", "--dtype", "bfloat16", "-o", "tiny.safetensors")
    code, out, err = run(*EDIT, "--packed", str(path), "-o", "a.png")
    assert (code, out) == (4, "") and "qengine.plain must be 'F32', got 'BF16'" in err and "hint: " in err
    assert run(*EDIT, "--packed", str(path), "--dtype", "bfloat16", "-o", "a.png")[0] == 0


def test_json_tells_what_was_written(run) -> None:
    code, out, _ = run("pack", "tiny", "--weights", "fp8", "--device", "cpu", "--json", "-o", "p.safetensors", "-q")
    data = json.loads(out)
    (file,) = data["files"]
    assert code == 0 and data["weights"] == "fp8" and file["component"] == "transformer"
    assert file["bytes"] == Path(file["path"]).stat().st_size


@pytest.mark.parametrize("how", ["truncated", "altered", "foreign", "empty", "of another model", "of the text encoder"])
def test_a_packed_file_that_is_not_whole_is_4_and_stays_as_it_is(run, folder: Path, how: str) -> None:
    path = pack(run, "--weights", "int8", "-o", "p.safetensors")
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-100])
    elif how == "altered":
        path.write_bytes(data[:-9000] + bytes(b ^ 1 for b in data[-9000:-8000]) + data[-8000:])
    elif how == "foreign":
        shutil.copy(TINY / "vae" / "diffusion_pytorch_model.safetensors", path)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of the text encoder":
        shutil.copy(pack(run, "--weights", "int8", "--component", "text_encoder"), path)
    words = ["--model", str(altered(folder))] if how == "of another model" else []
    before = path.read_bytes()
    code, out, err = run(*EDIT, *words, "--packed", str(path), "-o", "out.png")
    assert (code, out) == (4, "") and "p.safetensors" in err and "Traceback" not in err, err
    assert path.read_bytes() == before and not Path("out.png").exists()


def altered(folder: Path, **changed) -> Path:
    """The tiny model with other weights in its transformer."""
    model = folder / "model"
    shutil.copytree(TINY, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors | changed, file)
    return model


def test_a_weight_that_is_not_a_number_is_4_and_named(run, folder: Path) -> None:
    name = "transformer_blocks.1.attn.to_q.weight"
    (file,) = (TINY / "transformer").glob("*.safetensors")
    bad = load_file(file)[name]
    bad[3, 3] = float("nan")
    model = altered(folder, **{name: bad})
    Path("old.safetensors").write_bytes(b"the old file")
    code, out, err = run("pack", str(model), "--weights", "int8", "--device", "cpu", "-o", "old.safetensors")
    assert (code, out) == (4, "") and name in err and "Traceback" not in err
    assert Path("old.safetensors").read_bytes() == b"the old file"
    assert not list(folder.glob(".old*"))


def test_a_full_disk_is_3_before_anything_is_written(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 5))
    for words in (["-o", "new/p.safetensors"], ["--layout", "quanto", "-o", "new/p.safetensors"], []):
        code, out, err = run("pack", "tiny", "--weights", "int8", "--device", "cpu", *words)
        assert (code, out) == (3, "") and "free for the packed file" in err and "hint: make room" in err
    assert left(folder) == []


def test_ctrl_c_while_packing_leaves_nothing_and_keeps_the_old_file(folder: Path) -> None:
    """In a process of its own, interrupted after the first block."""
    Path("old.safetensors").write_bytes(b"the old file")
    code = (
        "import os, signal, sys\n"
        "from qengine.cli import main, meter\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have had it ignored
        "call = meter.PackMeter.__call__\n"
        "def pressed(self, done, total):\n"
        "    call(self, done, total)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "meter.PackMeter.__call__ = pressed\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = ["pack", "tiny", "--weights", "int8", "--device", "cpu", "-o", "old.safetensors"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT and done.stdout == "" and done.stderr.endswith("cancelled\n")
    assert left(folder) == ["old.safetensors"] and Path("old.safetensors").read_bytes() == b"the old file"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny"], "--weights must be int8, fp8 or bf16, got none"),
        (["--weights", "int8"], "pack must get one model, got 0"),
        (["tiny", "other", "--weights", "int8"], "pack must get one model, got 2"),
        (["tiny", "--weights", "int8", "--component", "both", "-o", "a.safetensors"], "for the transformer alone"),
        (["tiny", "--weights", "int8", "-o", "a.bin"], "ends in .safetensors"),
        (["tiny", "--weights", "bf16", "--layout", "quanto", "-o", "a.safetensors"], "--layout quanto must come with"),
        (["tiny", "--weights", "int8", "--layout", "quanto"], "--layout quanto must come with"),
    ],
)
def test_what_makes_no_sense_is_2(run, folder: Path, words: list[str], said: str) -> None:
    code, out, err = run("pack", *words)
    assert (code, out) == (2, "") and said in err
    assert left(folder) == []


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_M27_quanto_names_are_written_and_run_again(run, folder: Path, weights: str) -> None:
    model = folder / "model"
    shutil.copytree(TINY, model)
    (file,) = (model / "transformer").glob("*.safetensors")
    file.unlink()
    path = pack(run, "--weights", weights, "--layout", "quanto", "-o", str(file))
    assert (model / "transformer" / "quanto_qmap.json").is_file()
    names = set(load_file(path))
    assert "transformer_blocks.0.attn.to_q.weight._data" in names and "proj_out.weight" in names
    code, _, err = run("edit", *EDIT[1:], "--model", str(model), "-o", "out.png")
    assert code == 0 and f"stored in optimum-quanto's {weights}" in err
    assert run(*EDIT, "-o", "plain.png")[0] == 0
    with Image.open("out.png") as first, Image.open("plain.png") as second:
        difference = np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int))
    assert 0 < difference.max() < 32
