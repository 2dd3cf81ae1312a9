"""The GPU evidence at toy size on the CPU: what it writes, and what it does when something hangs or fails."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.bench import ops
from qengine.bench.gpu import __main__ as command
from qengine.bench.gpu import ahead, engine, kernels, probes, rival, table, zimage
from qengine.bench.gpu.geometry import EDIT_2511, TOY, Measured
from qengine.bench.gpu.watch import Stage, watch
from qengine.bench.gpu.worker import per_step
from qengine.engine.plan import Budget, Choices, DeviceFacts, ModelFacts, make_plan
from qengine.errors import DeviceError

CHILD = """
import json, sys, time
for case in sys.argv[1:]:
    if case == "hang":
        time.sleep(60)
    if case == "fail":
        raise RuntimeError("it broke")
    print("a library talks", flush=True)
    print(json.dumps({"case": case, "value": 1}), flush=True)
    print(json.dumps({"end": case}), flush=True)
"""
Lines = list[dict[str, Any]]


def attend(cases: tuple[str, ...], *, limit: float = 20.0, share: float = 60.0, left: float = 60.0) -> Lines:
    lines: Lines = []
    stage = Stage("stage", (sys.executable, "-c", CHILD), cases, limit, share)
    watch(stage, time.monotonic() + left, lines.append)
    return lines


def statuses(lines: Lines) -> list[tuple[str, str]]:
    return [(line["case"], line["status"]) for line in lines]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """The lines in the file after a run of all stages but the rivals, each in its process."""
    path = tmp_path_factory.mktemp("gpu") / "new" / "gpu.jsonl"
    words = [
        "--toy",
        "--deadline",
        "1500",
        "--json",
        str(path),
        "--commit",
        "abc",
        "--only",
        "probes",
        "kernels",
        "engine",
        "zimage",
        "ahead",
    ]
    assert command.main(words) == 0
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def of(lines: Lines, stage: str) -> Lines:
    return [line for line in lines if line["stage"] == stage]


def test_every_case_of_every_stage_gives_a_line(toy: Lines) -> None:
    assert {line["status"] for line in toy} == {"ok"}
    assert len({line["run"] for line in toy}) == 1
    assert [line["case"] for line in of(toy, "probes")] == list(probes.CASES)
    assert [line["case"] for line in of(toy, "kernels")] == list(kernels.cases(True))
    assert {line["case"] for line in of(toy, "ahead")} == set(ahead.cases(True))
    assert [line["case"] for line in of(toy, "engine")] == list(engine.TOY_CASES)
    assert [line["case"] for line in of(toy, "zimage")] == list(zimage.TOY_CASES)
    begin, end = of(toy, "run")
    assert (begin["case"], end["case"], begin["commit"]) == ("begin", "end", "abc")
    assert begin["versions"]["torch"] and begin["machine"]["system"]


def test_placement_changes_no_hash_and_another_format_does(toy: Lines) -> None:
    hashes = {
        weights: {line["hash"] for line in of(toy, "engine") if line["weights"] == weights}
        for weights in ("bf16", "fp8", "int8")
    }
    assert [len(found) for found in hashes.values()] == [1, 1, 1]
    assert len(set.union(*hashes.values())) == 3
    assert all(line["finite"] for line in of(toy, "engine") + of(toy, "zimage"))
    pairs = [(line["weights"], line["hash"]) for line in of(toy, "zimage")]
    assert len(set(pairs)) == len({weights for weights, _ in pairs}) == 2


def test_the_copies_counted_are_the_streamed_blocks_of_every_step(toy: Lines) -> None:
    runs = of(toy, "engine")
    assert [line["copies"] for line in runs] == [line["streamed"] * TOY.steps for line in runs]
    assert [line["copies"] for line in runs] == [line["copies_planned"] for line in runs]
    assert {line["streamed"] for line in runs} == {0, 1, 2, 3}
    assert all((line["host_bytes"] > 0) == (line["streamed"] > 0 and line["host"] == "arena") for line in runs)


def test_a_run_holds_what_the_plan_predicts_at_most_and_the_counter_saw_it(toy: Lines) -> None:
    for line in of(toy, "engine") + of(toy, "zimage"):
        assert 0 < line["peak_bytes"] <= line["plan_bytes"] <= line["ceiling_bytes"]


def test_the_link_says_why_memory_was_not_registered(toy: Lines) -> None:
    line = next(line for line in of(toy, "probes") if line["case"] == "link")
    assert line["registered"] is None and "no CUDA" in line["register_error"]
    assert probes.link_bytes_per_second(line) == line["pageable"] > 0


def test_the_smallest_case_of_every_op_passes_and_is_timed(toy: Lines) -> None:
    lines = of(toy, "kernels")
    assert [line["op"] for line in lines] == list(ops.names())
    for line in lines:
        assert line["passed"] and line["error"] <= line["bound"] and line["goal"] in kernels.GOALS.values()
        assert min(line["ours_seconds"], line["rival_seconds"], line["limit_seconds"], line["fraction_of_limit"]) > 0


def test_a_kernel_that_is_wrong_is_a_line_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(device: torch.device, generator: torch.Generator) -> ops.Case:
        x = torch.randn(3, 5, generator=generator, device=device)
        return ops.Case(lambda: x * 1.01, x.double(), x.clone, "copy", 2 * x.nbytes, 1e-6)

    monkeypatch.setattr(ops, "cases", lambda op: {"3x5": wrong})
    line = kernels.measure("copying", "3x5", torch.device("cpu"), 0.01)
    assert line["passed"] is False and "error of copying 3x5 must be at most 1e-06, got 0.01" in line["reason"]
    assert "NOT PASSED" in table.table([{"stage": "kernels", "case": "copying 3x5", "status": "ok", **line}])


def test_linear_layers_run_by_every_implementation_on_a_card() -> None:
    found = kernels.cases(False)
    assert len(set(found)) == len(found) and not any(kernels.BY in case for case in kernels.cases(True))
    for start, names in kernels.OTHERS.items():
        for name in names:
            assert any(case.startswith(start) and case.endswith(f" by {name}") for case in found), (start, name)


def test_a_pinned_implementation_that_cannot_run_here_is_a_line_with_its_reason() -> None:
    with ops.pinned("int_mm"):
        line = kernels.measure("linear", next(iter(ops.cases("linear"))), torch.device("cpu"), 0.01)
    assert line["passed"] is False and "int_mm: needs a CUDA device, not cpu" in line["reason"]
    assert ops.planned("linear_int8", torch.device("cpu")) == "reference"


def test_a_kernel_is_judged_by_its_share_of_the_limit_where_it_is_long_enough() -> None:
    assert kernels.judge("copy", 0.86, 1e-3) == {"goal": 0.85, "reached": True}
    assert kernels.judge("gemm", 0.74, 1e-3) == {"goal": 0.75, "reached": False}
    assert kernels.judge("gemm", 0.1, 1e-6)["reached"] is None


def test_kernels_are_checked_on_fresh_inputs_each_time(toy: Lines) -> None:
    seeds = [line["seed"] for line in of(toy, "kernels")]
    assert len(set(seeds)) == len(seeds)


def test_compiling_ahead_says_what_every_configuration_takes(toy: Lines) -> None:
    lines = of(toy, "ahead")
    assert {line["op"] for line in lines} == set(ahead.cases(True))
    assert all(line["cc"] == ahead.TOY_ARCHITECTURE and line["registers"] > 0 for line in lines)


def test_an_op_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="op must be one of"):
        ahead.compiled("no_such_op", 90)


def test_the_table_names_every_case_and_judges_every_goal(toy: Lines) -> None:
    text = table.table(toy)
    assert all(f"| {case} |" in text for case in (*engine.TOY_CASES, *kernels.cases(True)))
    assert "fp8: one hash in all 4 placements | 1 | met" in text
    assert "Z-Image fp8: one hash in all 2 placements | 1 | met" in text and "| Z-Image | s/step |" in text
    assert "at most 0.9 x diffusers resident | - | not measured" in text


def run_of(seconds: float, **other: Any) -> dict[str, Any]:
    line = {"weights": "fp8", "place": "12GiB", "seconds_per_step": seconds, "streamed": 0, "copies": 0}
    line |= {"copies_planned": 0, "peak_bytes": 100, "plan_bytes": 100, "ceiling_bytes": 100, "hash": "a"}
    return line | {"streamed_bytes_per_step": 0, "link_bytes_per_second": 1.0} | other


def test_goals_are_judged_by_the_figures_of_the_run() -> None:
    ours = {
        "fp8 resident": run_of(1.0, place="resident"),
        "fp8 12GiB": run_of(1.05, streamed=2, streamed_bytes_per_step=1.5, peak_bytes=101, hash="b"),
    }
    rivals = {"resident": {"seconds_per_step": 1.2}, "group 12GiB": {"seconds_per_step": 3.0}}
    found = {goal: (got, met) for goal, got, met in table.judge(ours, rivals)}
    assert found["fp8 12GiB: at most 0.9 x diffusers resident"] == (pytest.approx(0.875), True)
    assert found["fp8 12GiB: at least 3 x faster than group 12GiB"] == (pytest.approx(2.857, rel=1e-3), False)
    assert found["fp8 12GiB: at least 3 x faster than group"] == (None, None)
    assert found["fp8 12GiB: at most 1.03 x max(resident, bytes / link)"] == (pytest.approx(0.7), True)
    assert found["fp8 12GiB: at most 1.03 x resident"] == (pytest.approx(1.05), False)
    assert found["fp8 12GiB: peak / ceiling at most 1"][1] is False
    assert found["fp8 12GiB: peak / plan within 5%"][1] is True
    assert found["fp8: one hash in all 2 placements"] == (2, False)


def test_only_the_last_run_of_a_file_is_in_the_table() -> None:
    lines = [{"run": "a", "n": 1}, {"run": "b", "n": 2}, {"run": "b", "n": 3}]
    assert [line["n"] for line in table.last_run(lines)] == [2, 3]
    assert table.last_run([]) == []


def test_a_case_that_hangs_is_killed_and_those_after_it_run() -> None:
    before = time.monotonic()
    lines = attend(("one", "hang", "two"), limit=2.0)
    assert statuses(lines) == [("one", "ok"), ("hang", "killed"), ("two", "ok")]
    assert lines[1]["reason"] == "no end after 2 s" and time.monotonic() - before < 30


def test_a_case_that_raises_is_a_line_with_its_last_words() -> None:
    lines = attend(("fail", "one"))
    assert statuses(lines) == [("fail", "failed"), ("one", "ok")]
    assert lines[0]["reason"] == "exit 1: RuntimeError: it broke"


@pytest.mark.parametrize("room", [{"left": 2.0}, {"share": 2.0}])
def test_nothing_runs_after_the_deadline_or_the_share_of_a_stage(room: dict[str, float]) -> None:
    before = time.monotonic()
    lines = attend(("one", "hang", "two", "three"), **room)
    assert statuses(lines) == [("one", "ok"), ("hang", "killed"), ("two", "skipped"), ("three", "skipped")]
    assert {line["reason"] for line in lines[1:]} == {"no time left"} and time.monotonic() - before < 30


def test_a_child_that_cannot_start_its_module_is_a_line() -> None:
    lines: Lines = []
    watch(Stage("stage", (sys.executable, "-m", "no.such.module"), ("one",), 20.0), time.monotonic() + 60, lines.append)
    assert statuses(lines) == [("one", "failed")] and "No module named" in lines[0]["reason"]


def test_lines_are_in_the_file_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    record = command.Record(path, time.monotonic())
    for count in (1, 2):
        record.write({"stage": "probes", "case": "device", "status": "ok"})
        assert len(path.read_text("utf-8").splitlines()) == count


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_the_command_refuses_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA device must be there"):
        command.main(["--json", str(tmp_path / "gpu.jsonl")])
    assert not (tmp_path / "gpu.jsonl").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="group offload with streams works here")
def test_a_rival_that_cannot_run_is_a_line_and_not_a_crash() -> None:
    lines: Lines = []
    stage = next(stage for stage in command.stages(True) if stage.name == "rival" and "group" in stage.cases[0])
    watch(stage, time.monotonic() + 300, lines.append)
    assert statuses(lines) == [("group 12GiB", "failed")] and "stream" in lines[0]["reason"]


@pytest.mark.parametrize("offload", ["resident", "sequential"])
def test_a_rival_does_the_same_job(offload: str) -> None:
    line = rival.measure(TOY, torch.device("cpu"), offload, None)
    assert len(line["seconds"]) == rival.STEPS[offload] and line["peak_bytes"] > 0
    assert line["weight_bytes"] == 4 * sum(
        tensor.shape.numel() if isinstance(tensor, torch.Tensor) else tensor.nbytes // 2
        for tensor in TOY.source().transformer.checkpoint.tensors.values()
    )


def test_weights_differ_from_block_to_block_and_are_the_same_in_every_run() -> None:
    names = [f"transformer_blocks.{block}.attn.to_q.weight" for block in range(3)]
    checkpoints = [TOY.source().transformer.checkpoint for _ in range(2)]
    first, again = ([checkpoint.read(name) for name in names] for checkpoint in checkpoints)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def planned(geometry: Measured, weights: str, ceiling: int) -> int:
    """Blocks that are streamed by a plan for an 80 GB card under a ceiling in GiB; checks that they lie in memory."""
    gib = 1 << 30
    device = DeviceFacts(
        kind="cuda",
        architecture=90,
        total_bytes=80 * gib,
        free_bytes=79 * gib,
        context_bytes=gib // 2,
        host_total_bytes=128 * gib,
        host_free_bytes=120 * gib,
    )
    budget = Budget(vram_bytes=ceiling * gib, ram_bytes=engine.RAM_BYTES)
    facts = ModelFacts.of(geometry.source())
    phase = make_plan(facts, geometry.job(), budget, device, Choices(weights=weights)).phase("denoise")
    assert phase.blocks is not None and phase.blocks.placement.host == "arena"
    return len(phase.blocks.placement.copied)


def test_the_true_geometry_fits_every_ceiling_that_is_measured() -> None:
    """What a plan says without a card: fewer bytes, more streamed blocks, and 20.4 B parameters."""
    streamed = [planned(EDIT_2511, "fp8", ceiling) for ceiling in (24, 12, 8, 6)]
    assert streamed[0] == 0 and streamed == sorted(streamed) and len(set(streamed)) == 4
    assert ModelFacts.of(EDIT_2511.source()).transformer.part.parameters == 20_430_401_088


def test_z_image_fits_every_ceiling_that_is_measured() -> None:
    """6.15 B parameters: 8-bit weights stream nothing from 8 GiB on."""
    streamed = {ceiling: planned(zimage.TURBO, "fp8", ceiling) for ceiling in (8, 6, 4)}
    assert streamed[4] > streamed[6] > streamed[8] == 0 and planned(zimage.TURBO, "bf16", 8) > 0
    assert ModelFacts.of(zimage.TURBO.source()).transformer.part.parameters == 6_154_908_736


def test_the_first_step_does_not_count_where_there_are_others() -> None:
    assert per_step([9.0, 1.0, 2.0, 3.0]) == 2.0
    assert per_step([9.0]) == 9.0
