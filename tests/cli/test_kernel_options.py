"""Kernels and attention on the command line: both spellings, refusals, the record, and what happened on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine, FakeEvent
from PIL import Image
from qengine.cli.expand import expand
from qengine.cli.options import EDIT_SECTIONS, PLAN_SECTIONS, flags_by_spelling
from qengine.engine.metadata import read_metadata
from qengine.engine.plan import Choices

EDIT = ["edit", "photo.png", "make it grayscale", "--size", "64x48", "--steps", "1", "--device", "cpu"]
PINS = {"guidance": "reference", "rope": "triton"}
EDIT += ["--cfg", "2", "--negative_prompt", "red"]


@pytest.fixture(autouse=True)
def _own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(folder / "cache"))


def pixels(name: str) -> np.ndarray:
    with Image.open(name) as image:
        return np.asarray(image)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--attn_mode", "sageattn"], Choices(attention="sage")),
        (["--attn-mode", "torch", "--vae-tile", "64"], Choices(vae_tile=64)),
        (["--kernel", "guidance=reference", "rope=triton"], Choices(kernels=PINS)),
        (["--kernel", "guidance=reference", "--kernel", "rope=triton"], Choices(kernels=PINS)),
    ],
)
def test_M13_choices_reach_the_engine(run, engine: FakeEngine, words: list[str], expected: Choices) -> None:
    assert run("edit", "photo.png", "make it night", *words)[0] == 0
    assert run("edit", "photo.png", *words, "make it night")[0] == 0
    assert [opened["choices"] for opened in engine.opened] == [expected, expected]
    assert engine.requests[0].prompt == engine.requests[1].prompt == "make it night"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["a.png", "x", "--kernel", "a=b", "c.d=e"], ["a.png", "x", "--kernel", "a=b", "--kernel", "c.d=e"]),
        (["a.png", "--kernel", "a=b", "x"], ["a.png", "--kernel", "a=b", "x"]),
        (["a.png", "--kernel=a=b", "x = y"], ["a.png", "--kernel=a=b", "x = y"]),
        (["--kernel", "a=b", "--", "x"], ["--kernel", "a=b", "--", "x"]),
        (["a.png", "x", "--kernel"], ["a.png", "x", "--kernel"]),
    ],
)
def test_a_list_of_pins_ends_before_the_prompt(line: list[str], expected: list[str]) -> None:
    assert expand(line, flags_by_spelling(EDIT_SECTIONS.values())) == expected


def test_the_model_of_a_plan_is_found_beside_pins() -> None:
    flags = flags_by_spelling(PLAN_SECTIONS.values())
    assert expand(["tiny", "--kernel", "a=b"], flags) == ["tiny", "--kernel", "a=b"]
    assert expand(["--kernel", "a=b", "tiny"], flags) == ["--kernel", "a=b", "tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attn-mode", "fast"], "'fast' is not one of"),
        (["--attn_mode", "flash"], "attention must be one that can run here, got flash: needs a CUDA device, not cpu"),
        (["--kernel", "guidance"], "--kernel must be OP=NAME, got 'guidance'"),
        (["--kernel", "guidance=a", "guidance=b"], "--kernel must name guidance once, got a and b"),
        (["--kernel", "guidance=triton"], "triton: needs a CUDA device, not cpu; reference: can run"),
        (["--kernel", "fft=triton"], "kernels must name ops of this run"),
        (["--kernel", "attention=math"], "hint: --attn-mode"),
    ],
)
def test_M13_what_cannot_run_is_a_usage_error_and_nothing_is_written(run, words: list[str], said: str) -> None:
    code, out, err = run(*EDIT, *words, "-o", "out.png")
    assert (code, out) == (2, "") and said in err, err
    assert "Traceback" not in err and not Path("out.png").exists()


def test_M13_torch_is_sdpa_and_rerun_takes_up_what_was_asked(run) -> None:
    assert run(*EDIT, "-o", "plain.png")[0] == 0
    assert run(*EDIT, "--attn_mode", "torch", "-o", "torch.png")[0] == 0
    assert (pixels("plain.png") == pixels("torch.png")).all()
    code, _, err = run(*EDIT, "--attn_mode", "math", "--kernel", "guidance=reference", "-o", "math.png")
    assert code == 0, err
    said = read_metadata(Path("math.png"))["numerics"]
    assert said["attention"] == "math" and said["pinned"] == "guidance=reference"
    assert "transformer.attention=math" in said["kernels"]
    code, _, err = run("rerun", "math.png")
    assert code == 0, err
    assert read_metadata(Path("math_rerun.png"))["numerics"] == said
    assert (pixels("math_rerun.png") == pixels("math.png")).all()
    assert run("rerun", "math.png", "--attn-mode", "sdpa", "-o", "back.png")[0] == 0
    assert (pixels("back.png") == pixels("plain.png")).all()


def test_the_plan_names_kernels_and_explains_them_when_asked(run) -> None:
    words = ["plan", "tiny", "--vram", "4GiB", "--architecture", "75", "--weights", "fp8"]
    code, out, err = run(*words)
    assert code == 0, err
    assert "transformer.attention   sdpa-efficient" in out and "needs compute capability" not in out
    for flag in ("--explain", "-v"):
        explained = run(*words, flag)[1]
        assert "not sdpa-flash: needs compute capability 8.0, not 7.5" in explained
        assert "not scaled_mm: needs compute capability 8.9, not 7.5" in explained
    assert run(*words, "--attn_mode", "sage")[0] == 2


def test_what_happened_on_the_way_is_printed_at_the_end(run, engine: FakeEngine, monkeypatch) -> None:
    stream = engine.stream

    def told(request):
        for event in stream(request):
            if event.phase == "decode":
                event = FakeEvent(**{**vars(event), "notes": ("step 2 of 3 was done again",)})
            yield event

    monkeypatch.setattr(engine, "stream", told)
    code, _, err = run("edit", "photo.png", "make it night")
    assert code == 0 and "note: step 2 of 3 was done again" in err
