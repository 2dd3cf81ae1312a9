"""``qengine plan`` and the memory options: what they print, refuse and hand on, and what they never import or read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from headers import write_true_shape_checkpoint
from PIL import Image
from qengine.cli import machine
from qengine.engine import measure
from qengine.engine.plan import Budget, Choices

GIB = 1 << 30
REPORT = (
    "import sys, time; from qengine.cli import main; code = main(sys.argv[1:]); "
    "print(code, time.process_time(), *sys.modules, file=sys.stderr)"
)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_true_shape_checkpoint(tmp_path_factory.mktemp("hollow") / "Qwen-Image-Edit-2511"))


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cards", lambda: [])
    monkeypatch.setattr(measure, "host_memory", lambda: (200 * GIB, 200 * GIB))


def test_X02_plan_prints_arithmetic_decision_and_a_command(run, hollow: str) -> None:
    code, out, err = run("plan", hollow, "--vram", "12GiB", "--ram", "32GiB")
    assert code == 0 and not err
    row = next(line for line in out.splitlines() if line.startswith("transformer "))
    assert "20,430,401,088" in row and "BF16" in row and "40.86 GB" in row and "streamed from arena" in row
    assert "denoise (transformer)" in out and "VRAM" in out and "planned for a card that is not here" in out
    command = out.splitlines()[-1]
    assert command.startswith("qengine edit photo.jpg 'make it night' --model ") and "--vram 12GiB" in command


def test_X02_an_impossible_budget_is_refused_with_what_would_fit(run, hollow: str) -> None:
    code, out, err = run("plan", hollow, "--vram", "1GiB", "--ram", "32GiB")
    assert code == 5 and not out
    assert "--vram must be at least" in err and "got 1GiB" in err and "hint: " in err


def test_V35_json_gives_bytes_per_component(run, hollow: str) -> None:
    code, out, _ = run("plan", hollow, "--vram", "24", "--ram", "64", "--json")
    document = json.loads(out)
    assert code == 0
    for row in document["components"]:
        assert row["bytes"] == pytest.approx(2 * row["parameters"], rel=0.01)
    assert document["vram_bytes"] <= document["ceilings"]["vram_bytes"] == 24 * GIB
    assert {phase["name"] for phase in document["phases"]} == {"encode", "reference", "denoise", "decode"}


def test_the_command_printed_gives_the_same_plan(run, hollow: str) -> None:
    words = ["--vram", "12GiB", "--ram", "32GiB", "--weights", "int8"]
    first = json.loads(run("plan", hollow, *words, "--json")[1])
    swapped = first["command"].split("--blocks-to-swap ")[1].split()[0]
    again = json.loads(run("plan", hollow, *words, "--blocks-to-swap", swapped, "--json")[1])
    assert again["phases"] == first["phases"] and again["command"] == first["command"]


def test_planning_40_gb_reads_headers_only_within_a_second(hollow: str) -> None:
    words = ["plan", hollow, "--vram", "12GiB", "--ram", "32GiB", "--architecture", "86"]
    done = subprocess.run([sys.executable, "-c", REPORT, *words], capture_output=True, text=True, check=True)
    code, seconds, *modules = done.stderr.split()
    assert code == "0" and not {"torch", "transformers", "numpy", "PIL"} & set(modules)
    # the processor's time, interpreter and imports included: other work on the machine is not ours
    assert float(seconds) <= 1


def test_pictures_size_and_steps_are_planned_for(run, hollow: str, tmp_path: Path) -> None:
    photo = tmp_path / "tall.png"
    Image.new("RGB", (400, 800)).save(photo)
    words = ["--vram", "24", "--ram", "64", "--json"]
    one = json.loads(run("plan", hollow, "--ref", str(photo), "--prompt", "make it a watercolour", *words)[1])
    two = json.loads(run("plan", hollow, "--ref", str(photo), str(photo), "--size", "512x512", *words)[1])
    assert f"edit {photo} 'make it a watercolour'" in one["command"] and "--size 512x512" in two["command"]
    assert not any("no picture" in note or "no prompt" in note for note in one["notes"])
    assert one["phases"][2]["vram_items"] != two["phases"][2]["vram_items"]


def test_a_machine_without_a_card_is_planned_as_a_cpu(run, hollow: str) -> None:
    document = json.loads(run("plan", hollow, "--json")[1])
    assert document["device"]["kind"] == "cpu" and document["formats"]["transformer"] == "bf16"
    assert any("200GiB is free now" in note for note in document["notes"])
    code, _, err = run("plan", hollow, "--device", "cuda")
    assert code == 7 and "--architecture 86" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vram", "12 apples"], "a size must be a positive number"),
        (["--vram", "24", "--blocks-to-swap", "60"], "blocks_to_swap must be from 0 to 59, got 60"),
        (["--weights", "int8", "--fp8_scaled"], "--weights must be fp8 beside --fp8_scaled, got int8"),
        (["--offload", "sequential", "--blocks-to-swap", "3"], "blocks_to_swap must be given without offload"),
        (["--ref", "missing.png"], "missing.png must be a picture, got no such file"),
    ],
)
def test_what_makes_no_sense_is_refused(run, hollow: str, words: list[str], said: str) -> None:
    code, out, err = run("plan", hollow, *words)
    assert code in (2, 3) and not out and said in err


def test_plan_wants_one_model(run) -> None:
    code, _, err = run("plan", "--vram", "12")
    assert code == 2 and "plan must get one model, got 0" in err


def test_memory_options_reach_the_engine_under_every_name(run, engine: FakeEngine) -> None:
    ours = ["--vram", "6GiB", "--weights", "fp8", "--text-encoder-weights", "fp8", "--blocks-to-swap", "3"]
    theirs = ["--vram", "6", "--fp8_scaled", "--fp8_vl", "--blocks_to_swap", "3"]
    assert run("edit", "photo.png", "make it night", *ours)[0] == 0
    assert run("edit", "photo.png", "make it night", *theirs)[0] == 0
    assert run("edit", "photo.png", "make it night", "--fp8_base", "--text_encoder_cpu", "--vae-tile", "256")[0] == 0
    first, second, third = engine.opened
    assert first["budget"] == second["budget"] == Budget(vram_bytes=6 * GIB)
    assert first["choices"] == second["choices"]
    assert first["choices"] == Choices(weights="fp8", text_encoder_weights="fp8", blocks_to_swap=3)
    assert third["choices"] == Choices(weights="fp8", text_encoder_cpu=True, vae_tile=256)


def test_without_memory_options_the_engine_is_opened_as_before(run, engine: FakeEngine) -> None:
    assert run("edit", "photo.png", "make it night")[0] == 0
    assert "budget" not in engine.opened[0] and "choices" not in engine.opened[0]
