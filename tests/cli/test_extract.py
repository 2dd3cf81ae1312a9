"""``extract`` here, ``generate --conditioning`` there: files, words, refusals, and the picture of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qengine import Engine, GenerateRequest
from qengine.engine.given import Given
from qengine.engine.metadata import read_metadata
from qengine.engine.qx import blended, read_job
from qengine.engine.qx.header import sha256_of
from qengine.engine.vl import EXPERIMENTAL, BlendKnobs, Knobs, VLEmbeddingExtractor
from qengine.engine.vl.condition import total_std
from qengine.engine.vl.stats import compute_statistics, default_path, write_statistics
from vlpipelines import open_vl, picture, shared_vl
from zpipelines import build_zimage

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--size", "48x32", "--steps", "1", "--seed", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_zimage(tmp_path_factory.mktemp("z") / "tiny-z-image-turbo", cap_feat_dim=64))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ref.png and photo.png in it, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))
    picture(96, 64).save("ref.png")
    picture(50, 40, 1).save("photo.png")
    return tmp_path


def read(run: Run, *more: str, output: str = "job.qx") -> str:
    words = ("extract", "--image", "ref.png", "--text", "eating spaghetti", "--vl-model", str(shared_vl()))
    code, out, err = run(*words, "-o", output, *more)
    assert code == 0, err
    assert out.splitlines()[0] == output
    return err


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_V36_extract_writes_what_is_in_memory(place: Path, run: Run) -> None:
    said = read(run, "--hidden-layer", "-6", "-2", "--system-prompt", "be brief", "--think")
    job = read_job("job.qx")
    raw = open_vl().raw([Path("ref.png")], "eating spaghetti", (-6, -2), system_prompt="be brief", think_block=True)
    assert job.raw is not None
    assert all(torch.equal(job.raw.hidden[layer], raw.hidden[layer]) for layer in (-6, -2))
    assert torch.equal(job.raw.segments, raw.segments)
    assert (job.raw.prompt, job.raw.pictures, job.raw.think_block) == (raw.prompt, raw.pictures, True)
    assert job.knobs.hidden_layer == -6
    assert "MiB" in said or "KiB" in said
    assert str(place) not in Path("job.qx").read_bytes()[: 1 << 14].decode("utf-8", "ignore")


@pytest.mark.slow
def test_V38_a_file_of_another_process_has_the_same_bits(place: Path, run: Run) -> None:
    read(run)
    roots = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "qengine.cli", "extract", "-i", "ref.png", "--text", "eating spaghetti"]
    words += ["--vl-model", str(shared_vl()), "-o", "there.qx"]
    # the order of a CPU's sums, and so the last bits, depend on the number of threads
    env = {**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(words, check=True, env=env, timeout=120, capture_output=True)
    here, there = read_job("job.qx"), read_job("there.qx")
    assert here.tensors.keys() == there.tensors.keys()
    assert all(torch.equal(here.tensors[name], there.tensors[name]) for name in here.tensors)
    assert here.extractor == there.extractor


def test_V37_generate_from_a_file_is_the_run_in_one_process(
    place: Path, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(run)
    raw = open_vl().raw([Path("ref.png")], "eating spaghetti", (-6,))
    with Engine.open(model, device="cpu", cache_dir=place / "other") as engine:
        fields: dict[str, Any] = {"size": (48, 32), "num_inference_steps": 1, "seed": 3}
        text = engine.encode(GenerateRequest(prompt="Homer Simpson", **fields)).conditioning.prompt_embeds
        rows, _ = blended(raw, Knobs(target_std=61.0), BlendKnobs(0.5, "adain_per_dim"), text)
        *_, decoded = engine.stream(GenerateRequest(prompt="Homer Simpson", given=Given(rows), **fields))

    knobs = ("--alpha", "0.5", "--blend", "adain_per_dim", "--target-std", "61")
    words = ("generate", "Homer Simpson", "--conditioning", "job.qx", "--model", model, *SMALL, *knobs, "-o", "out.png")
    with monkeypatch.context() as without:
        without.setattr("qengine.engine.vl.extractor.open_vl", None)
        code, out, err = run(*words)
    assert (code, out) == (0, "out.png\n"), err
    assert np.array_equal(pixels("out.png"), np.asarray(decoded.image))
    assert err.count(EXPERIMENTAL) == 1
    assert "blend    blended: " in err

    said = read_metadata("out.png")["conditioning"]
    assert said["file"] == "job.qx"
    assert said["sha256"] == read_job("job.qx").sha256
    assert (said["blend"]["alpha"], said["blend"]["mode"], said["knobs"]["target_std"]) == (0.5, "adain_per_dim", 61)

    assert run("rerun", "out.png")[0] == 0
    assert np.array_equal(pixels("out_rerun.png"), pixels("out.png"))
    Path("moved").mkdir()
    Path("job.qx").rename("moved/elsewhere.qx")
    code, _, err = run("rerun", "out.png")
    assert code == 3
    assert "job.qx must be beside out.png" in err and "--conditioning" in err
    assert run("rerun", "out.png", "--conditioning", "moved/elsewhere.qx", "-o", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels("out.png"))
    read(run, "--hidden-layer", "-2")
    code, _, err = run("rerun", "out.png")
    assert code == 3 and "must be the recorded job file" in err


def test_prompt_and_initial_picture_can_be_in_the_file_too(place: Path, run: Run, model: str) -> None:
    request = ("--prompt", "Homer Simpson", *SMALL)
    read(run, "--model", model, *request, "--alpha", "0.4")
    job = read_job("job.qx")
    assert (job.prompt, job.blend.alpha, job.render["num_inference_steps"], job.render["seed"]) == (
        "Homer Simpson",
        0.4,
        1,
        3,
    )
    assert job.given.prompt_embeds is not None
    assert run("generate", "--conditioning", "job.qx", "--model", model, "--seed", "3", "-o", "file.png")[0] == 0
    read(run, output="bare.qx")
    words = ("generate", "--conditioning", "bare.qx", "--model", model, *request, "--alpha", "0.4", "-o", "bare.png")
    assert run(*words)[0] == 0
    assert np.array_equal(pixels("file.png"), pixels("bare.png"))


def test_an_edit_is_encoded_here_and_rendered_there(place: Path, run: Run) -> None:
    sized = ("--size", "64x48", "--steps", "2", "--seed", "5")
    assert run("edit", "photo.png", "make it grayscale", *sized, "-o", "whole.png")[0] == 0
    assert run("extract", "photo.png", "make it grayscale", "--model", "tiny", *sized, "-o", "edit.qx")[0] == 0
    Path("photo.png").unlink()
    code, _, err = run("generate", "--conditioning", "edit.qx", "--model", "tiny", "--seed", "5", "-o", "there.png")
    assert code == 0, err
    assert np.array_equal(pixels("whole.png"), pixels("there.png"))
    assert read_job("edit.qx").kind == "qwen-image-edit"
    for more, subject in (
        (("--prompt", "make it night"), "prompt must be the job file's"),
        (("--size", "48x48"), "size must be 64x48"),
    ):
        code, _, err = run("generate", "--conditioning", "edit.qx", "--model", "tiny", *more, "-o", "no.png")
        assert code == 2 and subject in err
    assert not Path("no.png").exists()


def test_V34_what_reads_is_freed_before_what_encodes_is_loaded(
    place: Path, run: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for owner, name in ((VLEmbeddingExtractor, "raw"), (VLEmbeddingExtractor, "unload"), (Engine, "extract")):
        kept = getattr(owner, name)

        def noted(self: Any, *args: Any, _kept: Any = kept, _name: str = name, **options: Any) -> Any:
            done.append(_name)
            return _kept(self, *args, **options)

        monkeypatch.setattr(owner, name, noted)
    read(run, "--model", model, "--prompt", "Homer Simpson", *SMALL)
    assert done == ["raw", "unload", "extract"]


def test_S15_the_picture_that_is_read_may_be_the_one_to_start_from_and_another_one_is_told(
    place: Path, run: Run, model: str
) -> None:
    clash = "the picture that the run starts from is not the one that was read"
    request = ("--model", model, "--prompt", "Homer Simpson", *SMALL)
    assert clash in read(run, *request, "--init-image", "photo.png", "--strength", "0.5")
    assert clash not in read(run, *request, "--init-image", "ref.png", "--strength", "1", output="same.qx")
    job = read_job("same.qx")
    assert job.given.init is not None and job.render["strength"] == 1
    words = ("generate", "--model", model, "--seed", "3", "-o", "out.png", "--conditioning")
    code, _, err = run(*words, "same.qx")
    assert code == 0 and clash not in err, err
    other = ("--init-image", "photo.png", "--strength", "1")
    code, _, err = run(*words, "same.qx", *other)
    assert code == 0 and clash in err, err
    code, _, err = run(*words, "same.qx", "--size", "64x64")
    assert code == 2 and "size must be 48x32 as the latents in the job file" in err


def test_what_a_logger_warns_of_is_a_note_said_once_and_not_to_the_quiet(place: Path, run: Run, model: str) -> None:
    assert read(run).count("note: hidden size of the Qwen3-VL model is 64") == 1
    assert read(run, "-q") == ""
    words = ("generate", "Homer Simpson", "--conditioning", "job.qx", "--model", model, *SMALL, "--blend", "linear")
    code, _, err = run(*words, "-o", "out.png")
    assert code == 0 and "note: linear blending keeps the first" in err


def test_a_file_for_another_model_is_refused(place: Path, run: Run, model: str, tmp_path: Path) -> None:
    read(run, "--model", model, "--prompt", "Homer Simpson", *SMALL)
    other = str(build_zimage(tmp_path / "other" / "tiny-z-image-turbo", seed=9, cap_feat_dim=64))
    words = ("generate", "--conditioning", "job.qx", *SMALL, "-o", "out.png", "--model")
    code, _, err = run(*words, other)
    assert code == 4 and "must be the one that encoded" in err
    code, _, err = run(*words, "tiny")
    assert code == 4 and "kind that the job file is for, z-image" in err
    assert not Path("out.png").exists()


def test_V40_printed_numbers_are_those_of_the_states(place: Path, run: Run) -> None:
    said = read(run)
    raw = read_job("job.qx").raw
    assert raw is not None
    states = raw.hidden[-6]
    assert f"layer -6: std of all {total_std(states):.4f}, image {total_std(states[raw.kinds == 2]):.4f}" in said
    assert f"std before: {total_std(states):.4f}" in said
    assert f"std after: {70:.4f} (global, factor {70 / total_std(states):.4f})" in said
    assert said.count(EXPERIMENTAL) == 1


def test_numbers_that_need_statistics_or_a_prompt_wait_for_the_run(place: Path, run: Run) -> None:
    for more in (("--normalization", "per_dim"), ("--target-std", "auto")):
        assert "is measured by the run" in read(run, *more)


def test_json_and_a_drawing(place: Path, run: Run) -> None:
    words = ("extract", "ref.png", "--vl-model", str(shared_vl()), "-o", "job.qx", "--report", "report.png", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    said = json.loads(out)
    assert (said["output"], said["kind"], said["plot"]) == ("job.qx", "z-image", "report.png")
    assert said["tensors"]["vl.hidden.-6"][1] == 64
    assert pixels("report.png").size
    code, out, _ = run(*words[:-1], "-q")
    assert (code, out) == (0, "job.qx\nreport.png\n")


def test_names_that_are_chosen_here_overwrite_nothing(place: Path, run: Run) -> None:
    words = ("extract", "ref.png", "--vl-model", str(shared_vl()))
    names = [run(*words)[1].strip() for _ in range(2)]
    assert names == ["ref.qx", "ref-1.qx"]
    Path("jobs").mkdir()
    assert run(*words, "-o", "jobs/")[1].strip() == "jobs/ref.qx"
    before = Path("ref.qx").read_bytes()
    assert run(*words, "--hidden-layer", "-2", "-o", "ref.qx")[0] == 0
    assert Path("ref.qx").read_bytes() != before


def test_a_picture_names_the_statistics_that_it_was_made_with(place: Path, run: Run, model: str) -> None:
    read(run)
    raw = read_job("job.qx").raw
    assert raw is not None
    default_path().parent.mkdir(parents=True)
    write_statistics(default_path(), compute_statistics([raw.hidden[-6]]))
    words = ("generate", "Homer Simpson", "--conditioning", "job.qx", "--model", model, *SMALL, "-o", "out.png")
    assert run(*words, "--normalization", "per_dim")[0] == 0
    said = read_metadata("out.png")["conditioning"]["statistics"]
    assert said == {"file": default_path().name, "sha256": sha256_of(default_path())}
    assert run("rerun", "out.png")[0] == 0
    assert np.array_equal(pixels("out_rerun.png"), pixels("out.png"))
    write_statistics(default_path(), compute_statistics([raw.hidden[-6] * 2]))
    code, _, err = run("rerun", "out.png")
    assert code == 3 and "the reference statistics of out.png" in err


def test_files_can_be_elsewhere(place: Path, run: Run, model: str) -> None:
    pytest.importorskip("fsspec")
    read(run, output="memory://jobs/far.qx")
    words = ("generate", "Homer Simpson", "--conditioning", "memory://jobs/far.qx", "--model", model, *SMALL)
    assert run(*words, "-o", "out.png")[0] == 0
    assert read_metadata("out.png")["conditioning"]["file"] == "far.qx"


@pytest.mark.parametrize(
    ("words", "code", "subject"),
    [
        (("extract", "ref.png"), 2, "extract must get a model"),
        (("extract", "--vl-model", "VL"), 2, "--vl-model must have a picture"),
        (("extract", "ref.png", "--model", "tiny"), 2, "--model must have a prompt"),
        (("extract", "none.png", "--vl-model", "VL"), 3, "no such file"),
        (("extract", "ref.png", "--vl-model", "nowhere"), 4, "Qwen3-VL must be a folder"),
        (("extract", "ref.png", "--vl-model", "VL", "--hidden-layer", "-7"), 2, "hidden_layer must be -1 to -6"),
        (("extract", "ref.png", "--vl-model", "VL", "--hidden-layer", "0"), 2, "hidden_layer must be -1 to -6"),
        (("extract", "ref.png", "--vl-model", "VL", "--alpha", "2"), 2, "alpha must be from 0 to 1"),
        (("extract", "ref.png", "--vl-model", "VL", "--mask-mode", "remove"), 2, "--mask-mode must stand beside"),
        (("extract", "ref.png", "--vl-model", "VL", "--mask-tokens", "900"), 2, "mask_tokens must be some of"),
        (("extract", "ref.png", "--vl-model", "VL", "-o", "job.pt"), 2, "job file must end in .qx"),
        (("extract", "ref.png", "--vl-model", "VL", "-o", "ref.png"), 2, "job file must end in .qx"),
        (("extract", "ref.png", "--vl-model", "VL", "--vl-statistics", "vl.pt"), 3, "vl.pt"),
        (("extract", "ref.png", "--vl-model", "VL", "--report", "ref.png"), 2, "must differ from the input"),
        (("extract", "ref.png", "x", "--model", "tiny", "--report", "r.png"), 2, "--report must stand beside"),
        (("extract", "ref.png", "x", "--prompt", "y", "--vl-model", "VL"), 2, "prompt must be given once"),
        (("extract", "broken.png", "--vl-model", "VL"), 3, "broken.png"),
        (("extract", "ref.png", "x", "--model", "Z", "--vl-model", "VL48"), 4, "width"),
        (("extract", "ref.png", "x", "--model", "tiny", "--vl-model", "VL"), 4, "must be a Z-Image"),
        (("generate", "x", "--conditioning", "none.qx", "--model", "tiny"), 3, "must be a job file, got no such file"),
        (("generate", "x", "--conditioning", "ref.png", "--model", "tiny"), 3, "qengine extract --image"),
        (("generate", "x", "--conditioning", "vl.pt", "--model", "tiny"), 3, "a pickle, which is never read"),
        (("generate", "x", "--conditioning", "job.qx"), 4, "model must be named"),
        (("rerun", "ref.png"), 3, "must carry a qengine record"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(
    place: Path, run: Run, model: str, words: tuple[str, ...], code: int, subject: str
) -> None:
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Path("vl.pt").write_bytes(b"PK\x03\x04")
    if "VL48" in words:
        words = (*words, "--size", "48x32")
        model = str(build_zimage(place / "narrow" / "tiny-z-image"))
    before = {path.name for path in place.iterdir()} - {"cache"}
    named = {"VL": str(shared_vl()), "VL48": str(shared_vl()), "Z": model}
    found, out, err = run(*(named.get(word, word) for word in words))
    assert (found, out) == (code, ""), err
    assert subject in err
    assert {path.name for path in place.iterdir()} - {"cache"} == before


def test_a_prompt_is_needed_below_alpha_1(place: Path, run: Run, model: str) -> None:
    read(run)
    words = ("generate", "--conditioning", "job.qx", "--model", model, *SMALL, "-o", "out.png")
    code, _, err = run(*words)
    assert code == 2 and "prompt must be given" in err and "--alpha 1" in err
    code, _, err = run(*words, "--alpha", "1")
    assert code == 0, err
    assert run("rerun", "out.png")[0] == 0
    assert np.array_equal(pixels("out_rerun.png"), pixels("out.png"))


def test_help_needs_no_torch() -> None:
    script = "import sys; from qengine.cli import main; main(['extract', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_flag_for_many_jobs_is_refused_for_one(run, tmp_path: Path) -> None:
    code, out, err = run("extract", "--image", "a.png", "--vl-model", "vl", "--resume", "-o", str(tmp_path / "a.qx"))
    assert (code, out) == (2, "") and "--resume must stand beside --jobs" in err
