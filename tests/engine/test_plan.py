"""The planner: placements under ceilings, on the true shapes of Edit-2511, without weights and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from headers import write_true_shape_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from qengine.engine.defaults import DEFAULTS
from qengine.engine.plan import (
    Budget,
    Choices,
    DeviceFacts,
    JobFacts,
    ModelFacts,
    Plan,
    foresee,
    make_plan,
    parse_size,
    size_text,
)
from qengine.engine.plan.jobs import area_size
from qengine.engine.plan.placement import Blocks
from qengine.engine.plan.words import as_json, as_text
from qengine.errors import PlanError, RequestError
from qengine.loaders import open_model

GIB = 1 << 30
PROPERTY = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    folder = write_true_shape_checkpoint(tmp_path_factory.mktemp("hollow") / "Qwen-Image-Edit-2511")
    return ModelFacts.of(open_model(folder, offline=True))


@cache
def job(size: tuple[int, int] = (1024, 1024), pictures: int = 1) -> JobFacts:
    return foresee(
        DEFAULTS["qwen-image-edit-2511"],
        [size] * pictures,
        {"prompt": "make it night", "size": size},
        {"patch_size": 14, "merge_size": 2, "min_pixels": 3136, "max_pixels": 12845056},
        multiple=16,
    )


def card(gib: float = 24, architecture: int = 86) -> DeviceFacts:
    return DeviceFacts(
        kind="cuda",
        name="a card",
        architecture=architecture,
        total_bytes=round(gib * GIB),
        free_bytes=round(gib * GIB),
        context_bytes=400 << 20,
        host_total_bytes=128 * GIB,
        host_free_bytes=120 * GIB,
    )


def host(gib: float = 64) -> DeviceFacts:
    size = round(gib * GIB)
    return DeviceFacts(kind="cpu", total_bytes=size, free_bytes=size, host_total_bytes=size, host_free_bytes=size)


def plan(model: ModelFacts, vram: float | None, ram: float | None = 64, *, on=None, what=None, **choices) -> Plan:
    budget = Budget(
        vram_bytes=None if vram is None else round(vram * GIB), ram_bytes=None if ram is None else round(ram * GIB)
    )
    return make_plan(model, what or job(), budget, on or card(48), Choices(**choices))


def streamed(made: Plan) -> int:
    blocks = made.phase("denoise").blocks
    assert blocks is not None
    return len(blocks.placement.copied)


def test_E11_the_planner_chooses_a_mode_for_40_24_16_and_12_gb(model: ModelFacts) -> None:
    lossless = {gib: streamed(plan(model, gib, weights="bf16")) for gib in (40, 24, 16, 12)}
    quantised = {gib: streamed(plan(model, gib)) for gib in (40, 24, 16, 12)}
    assert lossless[40] == 0 and 0 < lossless[24] < lossless[16] < lossless[12] < 60
    assert quantised[40] == quantised[24] == quantised[16] == 0 and 0 < quantised[12] < 20
    for gib in (40, 24, 16, 12):
        made = plan(model, gib)
        assert made.vram_bytes <= gib * GIB
        assert made.formats.transformer == "int8"


def test_M27_host_bytes_are_reported_and_count_the_streamed_slabs(model: ModelFacts) -> None:
    roomy, tight = plan(model, 24, weights="bf16"), plan(model, 8, weights="bf16")
    for made in (roomy, tight):
        denoise = made.phase("denoise")
        assert denoise.blocks is not None and denoise.blocks.placement.host == "arena"
        assert denoise.blocks.streamed_bytes < denoise.host_bytes <= made.host_bytes
        assert as_json(made)["host_bytes"] == made.host_bytes
    assert tight.host_bytes > roomy.host_bytes + 10 * GIB
    assert plan(model, 8, 8, weights="bf16").host_bytes <= 8 * GIB


def test_V35_components_are_parameters_times_dtype_within_one_percent(model: ModelFacts) -> None:
    made = as_json(plan(model, 24))
    rows = {row["name"]: row for row in made["components"]}
    assert rows["transformer"]["parameters"] == 20_430_401_088
    assert rows["text_encoder"]["parameters"] == 8_292_166_656
    assert rows["vae"]["parameters"] == 126_892_531 and rows["vae"]["used_parameters"] == 44_599_603
    for row in rows.values():
        assert row["bytes"] == pytest.approx(2 * row["parameters"], rel=0.01)
    denoise = plan(model, 40, weights="bf16").phase("denoise").blocks
    used = rows["transformer"]["used_parameters"]
    assert denoise is not None and sum(denoise.slab_bytes) == pytest.approx(2 * used, rel=0.01)


def test_X02_the_plan_says_component_dtype_bytes_and_place(model: ModelFacts) -> None:
    text = as_text(plan(model, 12, 32))
    row = next(line for line in text.splitlines() if line.startswith("transformer "))
    assert "20,430,401,088" in row and "BF16" in row and "40.86 GB" in row and "int8" in row
    assert "blocks resident" in row and "streamed from arena" in row
    assert text.splitlines()[-1].startswith("qengine edit ") and "--vram 12GiB --ram 32GiB" in text.splitlines()[-1]


def test_X02_a_budget_that_cannot_be_met_is_refused_with_what_would_fit(model: ModelFacts) -> None:
    with pytest.raises(PlanError, match="--vram must be at least .*, got 1GiB") as refused:
        plan(model, 1)
    assert refused.value.exit_code == 5 and refused.value.hint is not None
    least, ram = (parse_size(refused.value.hint.split(f"--{name} ")[1].split()[0]) for name in ("vram", "ram"))
    budget = Budget(vram_bytes=least, ram_bytes=ram)
    made = make_plan(model, job(), budget, card(), Choices())
    assert made.vram_bytes <= least and made.host_bytes <= ram
    with pytest.raises(PlanError):
        make_plan(model, job(), replace(budget, vram_bytes=least - (64 << 20)), card(), Choices())
    with pytest.raises(PlanError, match="--ram must be at least"):
        plan(model, 24, 1)


@PROPERTY
@given(first=st.floats(4, 48), second=st.floats(4, 48), ram=st.floats(4, 64), weights=st.sampled_from(["bf16", "int8"]))
def test_less_vram_never_makes_fewer_blocks_stream(model: ModelFacts, first, second, ram, weights) -> None:
    less, more = sorted((first, second))
    try:
        small = plan(model, less, ram, weights=weights)
    except PlanError:
        return
    large = plan(model, more, ram, weights=weights)
    assert streamed(small) >= streamed(large)


@PROPERTY
@given(vram=st.floats(3, 60), ram=st.floats(2, 80), weights=st.sampled_from(["auto", "bf16", "fp8"]))
def test_a_plan_is_within_both_ceilings_or_refused(model: ModelFacts, vram, ram, weights) -> None:
    try:
        made = plan(model, vram, ram, on=card(64), weights=weights)
    except PlanError as error:
        assert "must be at least" in error.message
        return
    assert made.ceilings.vram_bytes is not None
    for phase in made.phases:
        assert phase.vram_bytes <= made.ceilings.vram_bytes and phase.host_bytes <= made.ceilings.ram_bytes


@given(blocks=st.integers(1, 80), data=st.data())
def test_streamed_blocks_are_evenly_interleaved(blocks: int, data) -> None:
    count = data.draw(st.integers(1, blocks))
    indices = Blocks.of([4096] * blocks, count).placement.streamed
    gaps = [b - a for a, b in zip(indices, [*indices[1:], indices[0] + blocks], strict=True)]
    assert len(indices) == count and set(gaps) <= {blocks // count, -(-blocks // count)}


def test_a_number_of_blocks_is_obeyed_or_refused(model: ModelFacts) -> None:
    assert streamed(plan(model, 24, blocks_to_swap=31)) == 31
    assert streamed(plan(model, 48, blocks_to_swap=1)) == 1
    with pytest.raises(PlanError, match="with 3 blocks streamed"):
        plan(model, 12, blocks_to_swap=3)
    with pytest.raises(RequestError, match="blocks_to_swap must be from 0 to 59, got 60"):
        plan(model, 24, blocks_to_swap=60)


def test_offload_none_keeps_all_and_sequential_streams_all(model: ModelFacts) -> None:
    assert streamed(plan(model, 24, offload="none")) == 0
    with pytest.raises(PlanError, match="with offload none"):
        plan(model, 12, offload="none")
    made = plan(model, 48, offload="sequential")
    assert streamed(made) == 60 and made.kept_on_device == made.kept_on_host == ()
    assert all(phase.blocks is None or phase.blocks.resident_bytes == 0 for phase in made.phases)
    assert streamed(plan(model, 48, offload="blocks")) > 0


@pytest.mark.parametrize(("architecture", "expected"), [(75, "int8"), (86, "int8"), (89, "int8"), (90, "fp8")])
def test_auto_weights_follow_the_architecture_and_never_the_memory(model, architecture: int, expected: str) -> None:
    for vram in (8, 12, 48):
        assert plan(model, vram, on=card(48, architecture)).formats.transformer == expected
    assert plan(model, 48, on=card(48, 100)).formats.transformer == "fp8"
    assert plan(model, 48, on=card(48, 120)).formats.transformer == "int8"


def test_a_cpu_runs_as_stored_and_uses_mapped_slabs_where_it_can(model: ModelFacts) -> None:
    made = plan(model, None, 128, on=host(160))
    assert made.formats.transformer == "bf16" and made.formats.plain == "F32"
    assert made.ceilings.vram_bytes is None and streamed(made) == 0
    mapped = plan(model, None, 128, on=host(160), weights="int8").phase("denoise").blocks
    assert mapped is not None and mapped.placement.host == "mapped" and mapped.device_bytes == 0
    assert streamed(plan(model, None, 24, on=host(32))) > 0


def test_tiles_depend_on_the_size_and_the_choice_alone(model: ModelFacts) -> None:
    assert len({plan(model, vram).vae_tile_rows for vram in (6, 12, 24, 48)}) == 1
    small = plan(model, 24, vae_tile=256)
    assert small.vae_tile_rows == 256 and "--vae-tile 256" in small.command
    assert small.phase("decode").vram_bytes < plan(model, 24).phase("decode").vram_bytes


def test_the_text_encoder_on_the_cpu_takes_no_vram_and_is_recorded(model: ModelFacts) -> None:
    made = plan(model, 12, text_encoder_cpu=True, offload="sequential")
    assert made.phase("encode").device == "cpu"
    assert made.phase("encode").vram_bytes == made.device.context_bytes
    assert made.phase("encode").host_bytes > 13 * GIB
    assert "--text-encoder-cpu" in made.command and any("CPU" in note for note in made.notes)


def test_ceilings_that_are_not_given_leave_a_margin_and_say_so(model: ModelFacts) -> None:
    made = plan(model, None, None, on=card(24))
    assert made.ceilings.vram_bytes is not None and made.ceilings.vram_bytes < 24 * GIB
    assert any("VRAM ceiling" in note and "left to others" in note for note in made.notes)
    lowered = plan(model, 48, on=card(24))
    assert lowered.ceilings.vram_bytes == 24 * GIB and any("lowered" in note for note in lowered.notes)


def test_lossless_weights_are_hinted_where_they_cost_nothing(model: ModelFacts) -> None:
    slow_link = replace(card(40), probes={"tflops": {"bf16": 100.0, "int8": 105.0}})
    assert any("--weights bf16" in hint for hint in plan(model, 40, on=slow_link).hints)
    assert not plan(model, 40).hints


def test_more_pictures_and_larger_ones_need_more(model: ModelFacts) -> None:
    base = plan(model, 48).phase("denoise").vram_bytes
    assert plan(model, 48, what=job(pictures=3)).phase("denoise").vram_bytes > base
    assert plan(model, 48, what=job((2048, 2048))).phase("denoise").vram_bytes > base


def test_the_same_facts_give_the_same_plan(model: ModelFacts) -> None:
    assert as_json(plan(model, 12)) == as_json(plan(model, 12))
    json.dumps(as_json(plan(model, 12)))


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("12GiB", 12 << 30), ("12", 12 << 30), ("12g", 12 << 30), ("12GB", 12 * 10**9), ("512MiB", 512 << 20)],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "-1", "0", "12 apples", "nan", "GiB", "1e3", "12GiBB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="a size must be a positive number"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_a_size_as_text_is_read_back_within_a_hundredth_of_its_unit(nbytes: int) -> None:
    up, down = parse_size(size_text(nbytes)), parse_size(size_text(nbytes, up=False))
    slack = next((unit for unit in (1 << 30, 1 << 20, 1 << 10) if nbytes >= unit), 1) // 100 + 2
    assert down - 1 <= nbytes <= up + 1 and up - down <= slack


@pytest.mark.parametrize("wrong", [{"weights": "int4"}, {"offload": "some"}, {"blocks_to_swap": -1}, {"vae_tile": 0}])
def test_choices_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(wrong))} must be"):
        Choices(**wrong)
    with pytest.raises(RequestError):
        Choices(blocks_to_swap=3, offload="sequential")
    with pytest.raises(RequestError):
        Budget(vram_bytes=0)


@given(area=st.integers(1000, 10**7), ratio=st.floats(0.05, 20))
def test_areas_become_sizes_as_they_do_in_a_run(area: int, ratio: float) -> None:
    from qengine.engine.picture import calculate_dimensions

    assert area_size(area, ratio) == calculate_dimensions(area, ratio)


def test_importing_the_planner_loads_no_torch() -> None:
    code = "import sys, qengine.engine.plan, qengine.engine.plan.words; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_hollow_checkpoint_takes_no_room(tmp_path: Path) -> None:
    folder = write_true_shape_checkpoint(tmp_path / "Qwen-Image-Edit-2511")
    files = list(folder.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 57 * 10**9
    assert sum(file.stat().st_blocks * 512 for file in files) < 4 << 20
