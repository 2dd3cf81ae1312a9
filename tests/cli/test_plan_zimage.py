"""``qengine plan`` of Z-Image and of an extractor alone: what it prints, from headers of the true sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from headers import write_true_shape_vl, write_true_shape_zimage
from PIL import Image
from qengine.cli import machine
from qengine.engine import measure

GIB = 1 << 30
LOADED = (
    "import sys; from qengine.cli import main; code = main(sys.argv[1:]); print(code, *sys.modules, file=sys.stderr)"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hollow")
    write_true_shape_zimage(root / "Z-Image-Turbo")
    write_true_shape_vl(root / "Qwen3-VL-4B-Instruct")
    Image.new("RGB", (640, 480), (200, 90, 30)).save(root / "a.png")
    return root


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cards", lambda: [])
    monkeypatch.setattr(measure, "host_memory", lambda: (200 * GIB, 200 * GIB))


@pytest.mark.parametrize("gib", [12, 8])
def test_X02_zimage_is_planned_for_12_and_8_gb_cards(run, folder: Path, gib: int) -> None:
    words = ["plan", str(folder / "Z-Image-Turbo"), "--vram", f"{gib}GiB", "--ram", "32GiB"]
    code, out, err = run(*words)
    assert code == 0 and not err
    row = next(line for line in out.splitlines() if line.startswith("transformer "))
    assert "6,154,908,736" in row and "12.31 GB" in row and "all 32 blocks resident" in row
    assert ("text_encoder, kept" in out) == (gib == 12)
    assert out.splitlines()[-1].startswith("qengine generate 'a red bicycle' --model ")
    document = json.loads(run(*words, "--json")[1])
    assert document["vram_bytes"] <= gib * GIB
    for part in document["components"]:
        assert part["bytes"] == pytest.approx(2 * part["parameters"], rel=0.01)


def test_a_picture_to_start_from_is_planned_for_and_stands_in_the_command(run, folder: Path) -> None:
    words = ["plan", str(folder / "Z-Image-Turbo"), "--vram", "8GiB", "--ram", "16GiB"]
    start = ["--init-image", str(folder / "a.png"), "--strength", "0.9", "--steps", "9"]
    plain, started = (json.loads(run(*words, *more, "--json")[1]) for more in (["--size", "640x480"], start))
    peaks = [{phase["name"]: phase["vram_bytes"] for phase in each["phases"]} for each in (plain, started)]
    assert peaks[1]["reference"] > peaks[0]["reference"]
    assert "--steps 9 --init-image" in started["command"] and "--strength 0.9" in started["command"]


def test_X02_an_extractor_alone_is_planned(run, folder: Path) -> None:
    reader = str(folder / "Qwen3-VL-4B-Instruct")
    words = ["plan", "--extractor", reader, "--ram", "32GiB", "--ref", str(folder / "a.png"), "--text", "a cat"]
    code, out, err = run(*words, "--vram", "8GiB", "--hidden-layer", "-2", "-6")
    assert code == 0 and not err
    assert "4,437,815,808" in out and "35 decoder layers run" in out and "see (vl)" in out
    command = out.splitlines()[-1]
    assert command.startswith("qengine extract --image ") and "--hidden-layer -2 -6" in command
    assert f"--vl-model {reader} --vl-weights bf16 --vl-device cuda" in command and "--vram 8GiB" in command
    document = json.loads(run(*words, "--vram", "2GiB", "--json")[1])
    assert document["alone"] and document["vram_bytes"] <= 2 * GIB
    code, out, err = run(*words, "--vram", "1GiB")
    assert code == 5 and not out and "--vram must be at least" in err and "hint: this fits" in err
    assert run("plan", "tiny", "--extractor", reader)[0] == 2
    code, _, err = run(*words, "--vram", "8GiB", "--hidden-layer", "-40")
    assert code == 2 and "hidden_layer must be -1 to -36, got -40" in err


def test_planning_reads_headers_only_and_loads_no_torch(folder: Path) -> None:
    for words in (
        ["plan", str(folder / "Z-Image-Turbo")],
        ["plan", "--extractor", str(folder / "Qwen3-VL-4B-Instruct")],
    ):
        told = [*words, "--vram", "12GiB", "--ram", "32GiB", "--architecture", "86"]
        done = subprocess.run([sys.executable, "-c", LOADED, *told], capture_output=True, text=True, check=True)
        code, *modules = done.stderr.split()
        assert code == "0" and not {"torch", "transformers", "numpy", "PIL"} & set(modules)
