"""The planner on the true shapes of Z-Image: what fits 12 GB and 8 GB cards, what the least is, without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from headers import write_true_shape_zimage
from qengine.engine.defaults import DEFAULTS
from qengine.engine.given import Given
from qengine.engine.plan import Budget, Choices, DeviceFacts, JobFacts, ModelFacts, Plan, foresee, make_plan, parse_size
from qengine.engine.plan.words import as_json, as_text
from qengine.engine.request import GenerateRequest
from qengine.engine.resolve import resolve
from qengine.errors import PlanError
from qengine.loaders import open_model

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    folder = write_true_shape_zimage(tmp_path_factory.mktemp("hollow") / "Z-Image-Turbo")
    return ModelFacts.of(open_model(folder, offline=True))


def job(name: str = "z-image-turbo", **fields) -> JobFacts:
    return foresee(DEFAULTS[name], [], {"prompt": "a red bicycle", **fields}, {}, multiple=16)


def card(gib: float = 12, architecture: int = 86) -> DeviceFacts:
    size = round(gib * GIB)
    return DeviceFacts(
        kind="cuda",
        name="a card",
        architecture=architecture,
        total_bytes=size,
        free_bytes=size,
        context_bytes=500 << 20,
        host_total_bytes=64 * GIB,
        host_free_bytes=60 * GIB,
    )


def plan(model: ModelFacts, vram: float, ram: float = 32, what: JobFacts | None = None, **choices) -> Plan:
    budget = Budget(vram_bytes=round(vram * GIB), ram_bytes=round(ram * GIB))
    return make_plan(model, what or job(), budget, card(max(vram, 24)), Choices(**choices))


def streamed(made: Plan, phase: str = "denoise") -> int:
    blocks = made.phase(phase).blocks
    assert blocks is not None
    return len(blocks.placement.copied)


def test_V35_components_are_parameters_times_dtype_within_one_percent(model: ModelFacts) -> None:
    rows = {row["name"]: row for row in as_json(plan(model, 24))["components"]}
    counts = {name: row["parameters"] for name, row in rows.items()}
    assert counts == {"transformer": 6_154_908_736, "text_encoder": 4_022_468_096, "vae": 83_819_683}
    for row in rows.values():
        assert row["bytes"] == pytest.approx(2 * row["parameters"], rel=0.01)
        assert row["used_parameters"] <= row["parameters"]
    slabs = {phase.component: phase.blocks for phase in plan(model, 24, weights="bf16").phases if phase.blocks}
    sizes = {name: sum(blocks.slab_bytes) for name, blocks in slabs.items()}
    # 32 blocks without their modulation; 35 of 36 decoder layers
    assert sizes["transformer"] == pytest.approx(2 * 32 * 176_962_816, rel=0.01)
    assert sizes["text_encoder"] == pytest.approx(2 * 35 * 100_930_816, rel=0.01)
    eight = plan(model, 24, weights="int8").phase("denoise").blocks
    assert eight is not None and sum(eight.slab_bytes) == pytest.approx(32 * 176_962_816, rel=0.01)


def test_a_12_gb_card_keeps_all_of_it_and_an_8_gb_card_one_part_after_the_other(model: ModelFacts) -> None:
    roomy, small = plan(model, 12), plan(model, 8)
    assert roomy.formats.transformer == small.formats.transformer == "int8"
    assert set(roomy.kept_on_device) == {"vae", "transformer", "text_encoder"} and roomy.vram_bytes < 10 * GIB
    assert small.kept_on_device == ("vae",) and small.vram_bytes < 6.5 * GIB
    assert streamed(roomy) == streamed(small) == streamed(small, "encode") == 0


def test_lossless_weights_fit_both_cards_and_the_smaller_one_streams(model: ModelFacts) -> None:
    counts = {vram: streamed(plan(model, vram, weights="bf16")) for vram in (12, 8, 6)}
    assert counts[12] == 0 < counts[8] < counts[6] < 32
    assert plan(model, 8, weights="bf16").vram_bytes <= 8 * GIB


def test_the_least_that_is_told_is_enough_and_below_a_quarter_of_the_weights(model: ModelFacts) -> None:
    with pytest.raises(PlanError, match="--vram must be at least") as refused:
        plan(model, 1)
    least, ram = (parse_size(str(refused.value.hint).split(f"--{name} ")[1].split()[0]) for name in ("vram", "ram"))
    made = make_plan(model, job(), Budget(vram_bytes=least, ram_bytes=ram), card(), Choices())
    assert made.vram_bytes <= least < 2 * GIB
    assert streamed(made) == 32
    with pytest.raises(PlanError):
        make_plan(model, job(), Budget(vram_bytes=least - (64 << 20), ram_bytes=ram), card(), Choices())


def test_guidance_and_a_picture_to_start_from_need_more(model: ModelFacts) -> None:
    def needs(what: JobFacts) -> dict[str, int]:
        # under little memory nothing is kept, so the phases stand alone
        made = plan(model, 8, what=what, offload="sequential")
        return {phase.name: phase.vram_bytes for phase in made.phases}

    plain, guided = needs(job()), needs(job(guidance_scale=4.0))
    assert guided["denoise"] > plain["denoise"] and guided["encode"] > plain["encode"]
    assert job("z-image").branches == 2 and job().branches == 1
    started = needs(job(init_size=(1024, 1024)))
    assert started["reference"] > plain["reference"] and started["denoise"] == plain["denoise"]
    assert job(init_size=(3000, 2000)).target == (52, 78)
    assert job(init_size=(640, 480)).encoded == ((30, 40),)


def test_a_prompt_is_bounded_by_its_bytes_and_by_the_longest_chat(model: ModelFacts) -> None:
    assert job().text_tokens[0] < 32 and job(prompt="x" * 4000).text_tokens == (512,)
    assert "caption branch, once per prompt" in as_text(plan(model, 12))


def test_given_conditioning_needs_no_text_encoder_and_counts_its_own_rows(model: ModelFacts) -> None:
    request = GenerateRequest(prompt="x", given=Given(prompt_embeds=torch.zeros(1504, 2560)))
    facts = JobFacts.of(resolve(request, DEFAULTS["z-image-turbo"], 16), {})
    assert facts.text_tokens == (1504,) and not facts.encodes
    encoded = replace(facts, given_tokens=(), encodes=True)
    made, usual = (plan(model, 8, what=what, offload="sequential") for what in (facts, encoded))
    assert made.phase("encode").vram_bytes == made.device.context_bytes < usual.phase("encode").vram_bytes
    assert made.phase("denoise").vram_bytes > usual.phase("denoise").vram_bytes
    assert made.used_parameters["text_encoder"] == 0
    half = GenerateRequest(prompt="x", guidance_scale=2.0, given=Given(prompt_embeds=torch.zeros(40, 2560)))
    facts = JobFacts.of(resolve(half, DEFAULTS["z-image-turbo"], 16), {})
    assert facts.encodes and facts.text_tokens[0] == 40 and facts.branches == 2


def test_the_hollow_checkpoint_takes_no_room(tmp_path: Path) -> None:
    files = list(write_true_shape_zimage(tmp_path / "Z-Image").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 20 * 10**9
    assert sum(file.stat().st_blocks * 512 for file in files) < 4 << 20
