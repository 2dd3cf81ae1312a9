"""A step that is not finite is done again in the definitions of all ops, says so, and never becomes a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import EditRequest, Encoded, Engine, RunState, Step
from qengine.engine.defaults import DEFAULTS
from qengine.engine.dit import QwenImageTransformer
from qengine.engine.guard import Finite
from qengine.engine.plan import Choices
from qengine.errors import KernelError
from qengine.kernels.attention import sdpa

Spoil = Callable[[int, list[torch.Tensor]], None]

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
REQUEST = EditRequest(
    images=(Image.fromarray(PIXELS),), prompt="make it night", num_inference_steps=3, size=(48, 32), seed=5
)


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {name: 64 * 64 for name in ("area_pixels", "condition_area_pixels", "reference_area_pixels")}
    monkeypatch.setitem(DEFAULTS, "qwen-image-edit-2511", replace(DEFAULTS["qwen-image-edit-2511"], **small))


def opened(cache: Path, **options: Any) -> Engine:
    return Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=cache, **options)


def spoiling(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> list[int]:
    """Let ``spoil`` at the velocities of each evaluation; returns a list that grows by one number per evaluation."""
    calls: list[int] = []
    velocity = QwenImageTransformer.velocity

    def spoiled(self: QwenImageTransformer, *given: Any, **options: Any) -> list[torch.Tensor]:
        made = velocity(self, *given, **options)
        calls.append(len(calls))
        spoil(calls[-1], made)
        return made

    monkeypatch.setattr(QwenImageTransformer, "velocity", spoiled)
    return calls


def once(call: int, branch: int, value: float) -> Spoil:
    def spoil(number: int, made: list[torch.Tensor]) -> None:
        if number == call:
            made[branch][0, 3, 1] = value

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("scale", "branch"), [(1.0, 0), (3.0, 0), (3.0, 1)])
def test_one_bad_number_makes_the_step_run_again_and_says_so(tmp_path, monkeypatch, value, scale, branch) -> None:
    asked = replace(REQUEST, true_cfg_scale=scale)
    with opened(tmp_path) as engine:
        clean = list(engine.stream(asked))
        calls = spoiling(monkeypatch, once(1, branch, value))
        events = list(engine.stream(asked))
    steps = [event for event in events if isinstance(event, Step)]
    assert len(calls) == 4 and [step.index for step in steps] == [0, 1, 2]
    assert all(torch.isfinite(step.latents).all() and torch.isfinite(step.predicted).all() for step in steps)
    assert [len(step.notes) for step in steps] == [0, 1, 0]
    assert steps[1].notes[0].startswith("step 2 of 3 was not finite and was done again with transformer.attention math")
    assert events[-1].notes == steps[1].notes
    torch.testing.assert_close(events[-1].latents, clean[-1].latents, atol=1e-3, rtol=1e-3)


def test_steps_before_and_after_are_those_of_a_run_without_it(tmp_path, monkeypatch) -> None:
    with opened(tmp_path) as engine:
        clean = [event for event in engine.stream(REQUEST) if isinstance(event, Step)]
        spoiling(monkeypatch, once(2, 0, float("nan")))
        steps = [event for event in engine.stream(REQUEST) if isinstance(event, Step)]
    assert torch.equal(steps[0].latents, clean[0].latents) and torch.equal(steps[1].latents, clean[1].latents)


def test_a_resumed_run_ends_in_the_same_bits_after_a_bad_step(tmp_path, monkeypatch) -> None:
    """The same state is spoiled again, as a kernel would, so that it is the state that decides."""
    with opened(tmp_path) as engine:
        with monkeypatch.context() as patch:
            spoiling(patch, once(1, 0, float("nan")))
            events = list(engine.stream(REQUEST))
        state = next(event.state for event in events if isinstance(event, Step))
        state.save(tmp_path / "state.safetensors")
        spoiling(monkeypatch, once(0, 0, float("nan")))
        rest = list(engine.stream(REQUEST, resume=RunState.load(tmp_path / "state.safetensors")))
    assert torch.equal(rest[-1].latents, events[-1].latents)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_step_that_stays_bad_is_an_error_and_no_picture(tmp_path, monkeypatch, scale: float) -> None:
    def always(number: int, made: list[torch.Tensor]) -> None:
        if number:
            made[-1].fill_(float("nan"))

    calls, seen = spoiling(monkeypatch, always), []
    with opened(tmp_path) as engine:
        with pytest.raises(KernelError, match="velocity of step 2 of 3 must be finite, got NaN or infinity") as refused:
            seen.extend(engine.stream(replace(REQUEST, true_cfg_scale=scale)))
    assert len(calls) == 3 and refused.value.hint is not None and "--weights bf16" in refused.value.hint


def test_no_bad_step_leaves_the_stream(tmp_path, monkeypatch) -> None:
    spoiling(monkeypatch, lambda number, made: made[0].fill_(float("inf")))
    seen = []
    with opened(tmp_path) as engine, pytest.raises(KernelError):
        for event in engine.stream(REQUEST):
            seen.append(event)
    assert [type(event) for event in seen] == [Encoded]


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
def test_the_second_time_every_op_is_in_its_definition_and_nothing_is_read(tmp_path, monkeypatch, weights) -> None:
    given = []
    stack = QwenImageTransformer.stack
    with opened(tmp_path, choices=Choices(weights=weights)) as engine:
        plan = engine.plan(REQUEST)
        list(engine.stream(REQUEST))
        monkeypatch.setattr(QwenImageTransformer, "stack", lambda *words: given.append(words) or stack(*words))
        spoiling(monkeypatch, once(0, 0, float("nan")))
        read = engine.bytes_read
        list(engine.stream(REQUEST))
        assert engine.bytes_read == read
    expected = {"bf16": "torch", "int8": "reference", "fp8": "dequantise"}[weights]
    safe = plan.kernels_of("transformer", safe=True)
    assert [(words[1], words[3]) for words in given] == [(weights, safe)]
    definitions = {"linear": expected, "attention": "math", "modulate": "reference", "rope": "reference"}
    assert safe == definitions | ({} if weights == "bf16" else {"quant": "reference"})


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_attention_that_gives_nan_is_replaced_by_its_definition_at_every_step(tmp_path, monkeypatch, scale) -> None:
    asked = replace(REQUEST, true_cfg_scale=scale)
    with opened(tmp_path) as engine:
        clean = list(engine.stream(asked))
        monkeypatch.setattr(sdpa, "attend", lambda query, *_: torch.full_like(query, float("nan")).flatten(2))
        events = list(engine.stream(asked))
    assert len(events[-1].notes) == 3 and all("transformer.attention math" in note for note in events[-1].notes)
    torch.testing.assert_close(events[-1].latents, clean[-1].latents, atol=1e-3, rtol=1e-3)


def test_bad_steps_do_not_disturb_streamed_blocks(tmp_path, monkeypatch) -> None:
    results = []
    for offload in ("auto", "sequential"):
        with monkeypatch.context() as patch, opened(tmp_path, choices=Choices(offload=offload)) as engine:
            spoiling(patch, once(2, 0, float("nan")))
            *_, decoded = engine.stream(REQUEST)
            results.append(decoded.latents)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("x", "finite"),
    [(torch.zeros(3), True), (torch.tensor([1.0, float("nan")]), False), (torch.tensor([[float("-inf")]]), False)],
)
def test_the_flag_tells_finite_from_not(x: torch.Tensor, finite: bool) -> None:
    assert Finite(x).read() is finite


def test_on_a_card_the_flag_waits_for_its_own_event_alone() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a card")
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(2_000_000_000)
        late = torch.cuda.Event()
        late.record()
    assert Finite(torch.zeros(1000, device="cuda")).read() and not late.query()
