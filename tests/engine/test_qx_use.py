"""A run from a job file is the run in one process, bit by bit, without the model that read the picture."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import shared_pipeline
from qengine.engine.defaults import DEFAULTS
from qengine.engine.given import Given
from qengine.engine.qx import JobFile, blended, prepare, read_job, request_of, write_job
from qengine.engine.qx.make import encoded, extractor_words
from qengine.engine.request import EditRequest, GenerateRequest
from qengine.engine.session import Engine
from qengine.engine.vl import EXPERIMENTAL, BlendKnobs, Knobs, compute_statistics, write_statistics
from qengine.errors import CheckpointError, RequestError
from qxjobs import raw_of
from vlpipelines import picture, shared
from zpipelines import build_zimage

PROMPT = "Homer Simpson"
FIELDS: dict[str, Any] = {"size": (48, 32), "num_inference_steps": 1, "seed": 3}
ALL = tuple(range(-6, 0))


@cache
def model(root: Path) -> Path:
    return build_zimage(root / "tiny-z-image-turbo", cap_feat_dim=64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.open(model(tmp_path_factory.getbasetemp()), device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobFile:
    path = tmp_path_factory.mktemp("job") / "job.qx"
    write_job(path, JobFile(raw=raw_of(1, ALL), extractor=extractor_words(shared())))
    return read_job(path)


def pixels(engine: Engine, request: GenerateRequest) -> torch.Tensor:
    *_, decoded = engine.stream(request)
    return torch.from_numpy(np.asarray(decoded.image).copy())


def text_of(engine: Engine) -> torch.Tensor:
    return engine.encode(GenerateRequest(prompt=PROMPT, **FIELDS)).conditioning.prompt_embeds


KNOBS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.0},
    {"alpha": 1.0, "mode": "interpolate_area"},
    {"alpha": 0.5, "mode": "adain_per_dim", "hidden_layer": -2, "protect_first_token": True},
    {"hidden_layer": {-2: 0.7, -6: 0.3}, "token_selection": "image", "target_std": "auto"},
    {"mode": "per_token", "normalization_mode": "hybrid", "outlier_masking": "zero", "outlier_threshold": 1.5},
]


@pytest.mark.parametrize("said", KNOBS)
def test_V37_a_file_and_knobs_are_one_process_bit_by_bit(
    engine: Engine, job: JobFile, said: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text_of(engine)
    write_statistics(tmp_path / "stats.safetensors", compute_statistics([text, 3 * text + 1]))
    fields = set(Knobs.__dataclass_fields__)
    knobs = Knobs(**{name: value for name, value in said.items() if name in fields})
    blend = BlendKnobs(**{name: value for name, value in said.items() if name not in fields})
    rows, _ = blended(raw_of(1, ALL), knobs, blend, text, tmp_path / "stats.safetensors")
    expected = GenerateRequest(prompt=PROMPT, given=Given(rows), **FIELDS)

    monkeypatch.setattr("qengine.loaders.vl.open_vl", None)
    monkeypatch.setattr("qengine.engine.vl.extractor.open_vl", None)
    request = request_of(
        job, {**said, **FIELDS, "prompt": PROMPT, "statistics": tmp_path / "stats.safetensors"}, engine
    )
    assert request.given is not None
    assert torch.equal(request.given.tensors["prompt_embeds"], rows)
    assert request.given.key == expected.given.key and replace(request, given=expected.given) == expected
    if "hidden_layer" in said:
        assert torch.equal(pixels(engine, request), pixels(engine, expected))


def test_V22_alpha_0_is_the_prompt_alone_and_other_pictures_change_the_result(engine: Engine, job: JobFile) -> None:
    plain = pixels(engine, GenerateRequest(prompt=PROMPT, **FIELDS))
    none = request_of(job, {**FIELDS, "prompt": PROMPT, "alpha": 0.0}, engine)
    some = request_of(job, {**FIELDS, "prompt": PROMPT, "alpha": 0.6}, engine)
    assert torch.equal(pixels(engine, none), plain)
    assert not torch.equal(pixels(engine, some), plain)


def test_V37_a_prompt_is_needed_below_alpha_1_and_not_at_it(engine: Engine, job: JobFile) -> None:
    for said in ({}, {"alpha": 0.99}, {"alpha": 1.0, "alphas": (1.0, 1.0), "mode": "per_token"}):
        with pytest.raises(RequestError, match="prompt must be given"):
            request_of(job, {**FIELDS, **said}, engine)
    made = prepare(job, {**FIELDS, "alpha": 1.0}, engine)
    assert made.request.given is not None
    assert len(made.request.given.tensors["prompt_embeds"]) == len(job.tensors["vl.input_ids"])
    assert any("of the picture alone" in note for note in made.notes)
    assert made.record["alone"] is True
    assert pixels(engine, made.request).shape == (32, 48, 3)


def test_rows_above_the_models_limit_are_brought_to_it(tmp_path: Path, job: JobFile) -> None:
    short = build_zimage(tmp_path / "tiny-z-image", cap_feat_dim=64, axes_lens=[34, 64, 64])
    with Engine.open(short, device="cpu", cache_dir=tmp_path) as engine:
        lengths = {}
        for how in ("interpolate", "truncate", "pool", "attention_pool"):
            made = prepare(job, {**FIELDS, "alpha": 1.0, "token_selection": "all", "compression": how}, engine)
            assert made.request.given is not None
            lengths[how] = len(made.request.given.tensors["prompt_embeds"])
            assert any(f"brought to 32 ({how})" in note for note in made.notes) == (len(job.tensors["vl.segment"]) > 32)
    assert set(lengths.values()) == {min(32, len(job.tensors["vl.segment"]))}


def test_V39_V40_notes_say_experimental_once_and_the_spread_before_and_after(engine: Engine, job: JobFile) -> None:
    notes = prepare(job, {**FIELDS, "prompt": PROMPT}, engine).notes
    assert notes.count(EXPERIMENTAL) == 1
    text = text_of(engine)
    assert f"text: {len(text)} rows, std {text.double().std():.4f}" in notes
    assert any(note.startswith("blended: ") for note in notes)


def test_a_models_width_and_kind_are_checked(engine: Engine, job: JobFile, tmp_path: Path) -> None:
    other = build_zimage(tmp_path / "tiny-z-image")
    with Engine.open(other, device="cpu") as narrow, pytest.raises(CheckpointError, match="width in the job file, 64"):
        request_of(job, {**FIELDS, "prompt": PROMPT}, narrow)
    with Engine.open(device="cpu") as tiny, pytest.raises(CheckpointError, match="kind that the job file is for"):
        request_of(job, {**FIELDS, "prompt": PROMPT}, tiny)
    with pytest.raises(CheckpointError, match="kind"):
        request_of(replace(job, kind="qwen-image-edit", raw=None), {}, engine)


@pytest.mark.parametrize("said", [{"unheard": 1}, {"images": ()}, {"given": None, "reference": 2}, {"alpha": 1.5}])
def test_settings_that_make_no_sense_are_refused(engine: Engine, job: JobFile, said: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        request_of(job, {**FIELDS, "prompt": PROMPT, **said}, engine)


def test_a_layer_that_is_not_in_the_file_and_missing_statistics_are_told(
    engine: Engine, job: JobFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert job.raw is not None
    one = replace(job, raw=replace(job.raw, hidden={-6: job.raw.hidden[-6]}))
    with pytest.raises(RequestError, match="layer"):
        request_of(one, {**FIELDS, "prompt": PROMPT, "hidden_layer": -2}, engine)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "none"))
    with pytest.raises(RequestError, match="must have reference statistics"):
        request_of(job, {**FIELDS, "prompt": PROMPT, "normalization_mode": "per_dim"}, engine)


def test_what_is_said_wins_over_the_jobs_options_and_those_over_its_knobs(engine: Engine, job: JobFile) -> None:
    full = replace(
        job,
        knobs=Knobs(hidden_layer=-2),
        blend=BlendKnobs(0.1, "adain"),
        render={"alpha": 0.2, "prompt": "a", "seed": 5, "hidden_layer": {"-3": 1.0}, "size": [48, 32], "count": None},
    )
    full = replace(full, render={name: value for name, value in full.render.items() if name != "count"})
    made = prepare(full, {"prompt": PROMPT, "num_inference_steps": 2}, engine)
    assert (made.request.prompt, made.request.seed, made.request.size) == (PROMPT, 5, (48, 32))
    assert made.record["knobs"]["hidden_layer"] == {"-3": 1.0}
    assert made.record["blend"]["alpha"] == 0.2
    assert made.record["blend"]["mode"] == "adain"
    assert prepare(full, {"alpha": 0.9}, engine).record["blend"]["alpha"] == 0.9


def test_tokenizers_and_think_blocks_that_differ_are_told(engine: Engine, job: JobFile) -> None:
    def notes(one: JobFile) -> str:
        return "\n".join(prepare(one, {**FIELDS, "prompt": PROMPT}, engine).notes)

    assert job.raw is not None
    assert "have different vocabularies" in notes(job)
    assert "think block" not in notes(job)
    same = replace(job, extractor={})
    assert "vocabularies" not in notes(same)
    assert "think block" in notes(replace(same, raw=replace(job.raw, variant="thinking")))


def test_an_edit_from_a_file_is_the_edit_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = DEFAULTS["qwen-image-edit-2511"]
    small = replace(defaults, area_pixels=4096, condition_area_pixels=4096, reference_area_pixels=4096)
    monkeypatch.setitem(DEFAULTS, "qwen-image-edit-2511", small)
    images = (tmp_path / "0.png",)
    for number, path in enumerate(images):
        picture(64, 48 + 16 * number, number).save(path)
    request = EditRequest(images=images, prompt="make it night", num_inference_steps=1, seed=4)
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path / "here") as here:
        expected = pixels(here, request)
        write_job(tmp_path / "edit.qx", encoded(here, request, {"num_inference_steps": 1}))
    for path in images:
        path.unlink()
    job = read_job(tmp_path / "edit.qx")
    assert [seen.width for seen in job.pictures] == [64] and job.given.negative_embeds is not None
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path / "there") as there:
        assert np.array_equal(pixels(there, request_of(job, {"seed": 4}, there)), expected)
        again = request_of(job, {"seed": 4, "prompt": "make it night", "negative_prompt": " "}, there)
        assert again.given is job.given
        for said in ({"prompt": "make it day"}, {"negative_prompt": "blurry"}, {"size": (48, 48)}):
            with pytest.raises(RequestError, match="as the latents|must be the job file's"):
                request_of(job, said, there)


def test_text_alone_is_no_job_but_of_z_image(engine: Engine) -> None:
    with Engine.open(device="cpu") as tiny, pytest.raises(RequestError, match="of Z-Image or of an edit"):
        encoded(tiny, GenerateRequest(prompt="x"))
    job = encoded(engine, GenerateRequest(prompt=PROMPT, **FIELDS))
    assert job.given.prompt_embeds is not None
    assert torch.equal(job.given.prompt_embeds, text_of(engine))
