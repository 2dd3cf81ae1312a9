"""Qwen3-VL under ceilings: true shapes in the plan, predictions against what is alive, the same bits however placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from headers import write_true_shape_vl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from qengine.engine.ceiling import AllocationMeter
from qengine.engine.plan import Budget, Choices, DeviceFacts, Extraction, ExtractorFacts, plan_extraction
from qengine.engine.plan.activations import Linear
from qengine.engine.plan.vl import layer_bytes, tower_bytes
from qengine.engine.plan.words import extractor_json, extractor_text
from qengine.engine.vl import UnloadedError
from qengine.engine.vl.memory import PlannedExtractor, open_planned
from qengine.errors import MemoryLadderError, PlanError, RequestError
from qengine.loaders.vl import open_vl
from vlpipelines import LAYERS, picture, shared_vl
from vlpipelines import open_vl as open_extractor

GIB = 1 << 30
TEXT = "Homer Simpson"


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> ExtractorFacts:
    return ExtractorFacts.of(open_vl(write_true_shape_vl(tmp_path_factory.mktemp("hollow") / "Qwen3-VL-4B-Instruct")))


def card(gib: float) -> DeviceFacts:
    size = round(gib * GIB)
    return DeviceFacts(
        kind="cuda",
        architecture=86,
        total_bytes=size,
        free_bytes=size,
        context_bytes=500 << 20,
        host_total_bytes=64 * GIB,
        host_free_bytes=60 * GIB,
    )


def plan(facts: ExtractorFacts, gib: float, weights: str = "bf16", **job: Any):
    made = Extraction.foresee(facts, [(1024, 1024)], text=TEXT, **job)
    budget = Budget(vram_bytes=round(gib * GIB), ram_bytes=32 * GIB)
    return plan_extraction(facts, made, budget, card(24), Choices(text_encoder_weights=weights))


def test_V35_the_extractor_is_parameters_times_dtype(true: ExtractorFacts) -> None:
    (row,) = extractor_json(plan(true, 12))["components"]
    assert row["parameters"] == 4_437_815_808
    assert row["bytes"] == pytest.approx(2 * row["parameters"], rel=0.01)
    # the tower and 31 of 36 layers
    assert row["used_parameters"] == pytest.approx(415_347_712 + 31 * 100_930_816, rel=0.01)
    assert true.tower_bytes("BF16") == pytest.approx(2 * 415_347_712, rel=0.02)


def test_an_8_gb_card_reads_pictures_losslessly_and_a_smaller_one_streams(true: ExtractorFacts) -> None:
    eight, six, small = plan(true, 8), plan(true, 6), plan(true, 4, "int8")
    counts = [len(made.phase("read").blocks.placement.copied) for made in (eight, six, small)]
    assert counts[0] == 0 < counts[1] < 31 and counts[2] < 5
    assert not eight.alone and six.alone
    for made, gib in ((eight, 8), (six, 6), (small, 4)):
        assert made.vram_bytes <= gib * GIB
    with pytest.raises(PlanError, match="--vram must be at least") as refused:
        plan(true, 1)
    assert "--vram" in str(refused.value.hint) and "qengine extract" in str(refused.value.hint)


def test_a_plan_is_printed_with_arithmetic_and_a_command(true: ExtractorFacts) -> None:
    text = extractor_text(plan(true, 8, layers=[-2, -6]))
    assert "4,437,815,808" in text and "see (vl)" in text and "read (vl)" in text and "35 decoder layers run" in text
    command = text.splitlines()[-1]
    assert command.startswith("qengine extract") and "--vl-weights bf16" in command and "--vram 8GiB" in command


def test_fewer_layers_and_smaller_pictures_need_less(true: ExtractorFacts) -> None:
    assert plan(true, 12, layers=[-24]).vram_bytes < plan(true, 12, layers=[-6]).vram_bytes
    small = Extraction.foresee(true, [(256, 256)])
    assert layer_bytes(true, small, 2, Linear("torch", 2)) < layer_bytes(
        true, Extraction.foresee(true, [(1024, 1024)]), 2, Linear("torch", 2)
    )


@settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    size=st.tuples(st.integers(32, 256), st.integers(32, 256)),
    layer=st.integers(-LAYERS, -1),
    masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_an_extraction_allocates_no_more_than_predicted(size, layer, masked, dtype) -> None:
    extractor = open_extractor(dtype=dtype)
    extractor.raw(picture(32, 32), layers=(-1,))
    facts = ExtractorFacts.of(extractor.source)
    given_mask = (0,) if masked else ()
    job = Extraction.foresee(facts, [size], text=TEXT, layers=[layer], masked=masked)
    with AllocationMeter(meta=False) as live:
        found = extractor.raw(picture(*size), TEXT, (layer,), mask_tokens=given_mask)
    assert len(found.input_ids) <= job.chat.prompt_tokens[0]
    s = dtype.itemsize
    predicted = max(tower_bytes(facts, job, s), layer_bytes(facts, job, s, Linear("torch", s)))
    # the image processor's patches are numpy's, which no tensor operation makes
    patches = 4 * facts.patch_values * sum(rows * columns for rows, columns in job.chat.patches)
    assert live.peak <= predicted <= 2 * (live.peak + patches) + (256 << 10)


def extract(extractor: PlannedExtractor, layers: tuple[int, ...] = (-2,)) -> torch.Tensor:
    return torch.cat(list(extractor.raw(picture(64, 48), TEXT, layers).hidden.values()))


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    made = {}
    for weights in ("bf16", "int8", "fp8"):
        extractor = open_extractor(weight_format=weights)
        made[weights] = torch.cat(list(extractor.raw(picture(64, 48), TEXT, (-2,)).hidden.values()))
    return made


def planned(cache: Path, **options: Any) -> PlannedExtractor:
    return open_planned(shared_vl(), "cpu", "float32", cache=cache, **options)


@pytest.mark.parametrize("weights", ["bf16", "int8", "fp8"])
def test_X01_placement_never_changes_bits(weights: str, expected, tmp_path: Path) -> None:
    hosts = set()
    for options in ({}, {"offload": "sequential"}, {"budget": Budget(vram_bytes=1 << 31)}):
        extractor = planned(tmp_path, weight_format=weights, **options)
        assert torch.equal(extract(extractor), expected[weights])
        tape = extractor.tape
        assert tape is not None
        hosts.add((tape.placement.host, len(tape.placement.streamed)))
        extractor.unload()
    depth = LAYERS - 1
    mapped = {("mapped", depth), ("disk", depth), ("arena", 0)}
    assert hosts == ({("arena", 0), ("arena", depth)} if weights == "bf16" else mapped)


def test_the_least_ceiling_holds_and_gives_the_same_bits(expected, tmp_path: Path) -> None:
    low, high = 1, 1 << 30
    while high - low > 4096:
        middle = (low + high) // 2
        extractor = planned(tmp_path, budget=Budget(vram_bytes=middle))
        try:
            extractor._plan_of(picture(64, 48), TEXT, (-2,))
            high = middle
        except PlanError:
            low = middle
    extractor = planned(tmp_path, budget=Budget(vram_bytes=high))
    assert torch.equal(extract(extractor), expected["bf16"])
    assert extractor.plan is not None and extractor.plan.alone and not extractor.told
    assert extractor._ceiling is not None and 0 < extractor._ceiling().peak <= high
    assert torch.equal(extract(extractor), expected["bf16"])
    extract(extractor, (-1,))
    assert extractor.plan.depth == LAYERS


class Failing(AllocationMeter):
    """Raises once, at the k-th allocating operation; or at every one from there on."""

    def __init__(self, k: int, *, always: bool = False) -> None:
        super().__init__(meta=False)
        self.k, self.always = k, always

    def _allocated(self) -> None:
        super()._allocated()
        if self.allocations == self.k or (self.always and self.allocations >= self.k):
            raise torch.OutOfMemoryError(f"injected at allocation {self.allocations}")


def failing(cache: Path, k: int, *, always: bool = False) -> tuple[PlannedExtractor, Failing]:
    extractor, meter = planned(cache), Failing(k, always=always)
    extractor._ceiling = lambda: meter
    return extractor, meter


@pytest.mark.parametrize("count", [5, pytest.param(320, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_E16_running_out_of_memory_anywhere_ends_in_the_same_states(count: int, expected, tmp_path: Path) -> None:
    extractor, meter = failing(tmp_path, 0)
    extract(extractor)
    total = meter.allocations
    for k in sorted({1 + round(i * (total - 1) / (count - 1)) for i in range(count)}):
        extractor, meter = failing(tmp_path, k)
        assert torch.equal(extract(extractor), expected["bf16"]), k
        assert meter.allocations > k and len(extractor.told) == 1


def test_E16_memory_that_stays_out_is_told_and_the_next_pass_works(expected, tmp_path: Path) -> None:
    extractor, meter = failing(tmp_path, 40, always=True)
    with pytest.raises(MemoryLadderError, match="to extract after 3 retries") as caught:
        extract(extractor)
    assert caught.value.exit_code == 6 and "--offload sequential" in str(caught.value.hint)
    meter.always = False
    assert torch.equal(extract(extractor), expected["bf16"])


def test_V34_an_extractor_is_gone_before_the_next_model_loads(tmp_path: Path) -> None:
    meter = AllocationMeter(meta=False)
    extractor = planned(tmp_path)
    extractor._ceiling = lambda: meter
    extract(extractor)
    weights = meter.live
    extractor.unload()
    assert meter.live < weights // 4
    with pytest.raises(UnloadedError):
        extract(extractor)


def test_a_layer_that_is_none_is_refused_before_anything_loads(tmp_path: Path) -> None:
    extractor = planned(tmp_path)
    with pytest.raises(RequestError, match="hidden_layer must be -1 to"):
        extract(extractor, (-99,))
    assert extractor.tape is None
