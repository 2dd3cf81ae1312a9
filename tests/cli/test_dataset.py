"""``extract --dataset-config`` on the command line: musubi-tuner's words, what is told, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qengine.loaders.source import TINY
from safetensors.torch import load_file
from vlpipelines import picture

Run = Callable[..., tuple[int, str, str]]
CONFIG = """[general]
resolution = [32, 32]
caption_extension = ".txt"
[[datasets]]
image_directory = "images"
control_directory = "controls"
cache_directory = "cache"
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a dataset of two pictures in set/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "engine"))
    for folder in ("images", "controls"):
        Path("set", folder).mkdir(parents=True)
        for number, name in enumerate("ab"):
            picture(40, 36, number).save(Path("set", folder, f"{name}.png"))
            Path("set/images", f"{name}.txt").write_text(f"caption {name}")
    Path("set/dataset.toml").write_text(CONFIG)
    return tmp_path


def cache(run: Run, kind: str, *more: str) -> tuple[int, str, str]:
    return run("extract", "--dataset_config", "set/dataset.toml", "--cache", kind, "--model", "tiny", *more)


def test_M37_latents_are_cached_and_a_second_run_keeps_them(place: Path, run: Run) -> None:
    code, out, err = cache(run, "latents", "--num_workers", "4", "--keep_cache")
    files = [f"set/cache/{name}_0040x0036_qie.safetensors" for name in "ab"]
    assert code == 0 and out.split() == files and "2 made  0 kept  0 failed" in err, err
    Path("set/images/a.txt").unlink()
    code, out, err = cache(run, "latents")
    assert code == 0 and out.split() == files[1:] and "0 made  1 kept" in err
    assert "left out" in err and "are removed: " in err and not Path(files[0]).exists()


def test_M37_musubis_own_words_need_the_vae_alone(place: Path, run: Run) -> None:
    words = ("extract", "--dataset_config", "set/dataset.toml", "--cache", "latents", "--vae", str(TINY / "vae"))
    code, out, err = run(*words, "--edit_plus")
    assert code == 0 and out.split() == [f"set/cache/{name}_0040x0036_qie.safetensors" for name in "ab"], err
    code, out, err = run(*words)
    assert code == 0 and out.split() == [f"set/cache/{name}_0040x0036_qi.safetensors" for name in "ab"], err
    code, _, err = run(*words, "--vram", "8GiB")
    assert code == 2 and "--vram must come with a whole model" in err


def test_M38_captions_are_cached_and_the_batch_size_changes_nothing(place: Path, run: Run) -> None:
    assert cache(run, "text", "--batch_size", "1")[0] == 0
    files = sorted(Path("set/cache").glob("*.safetensors"))
    assert [path.name for path in files] == ["a_qie_te.safetensors", "b_qie_te.safetensors"]
    before = [load_file(path) for path in files]
    for path in files:
        path.unlink()
    code, out, _ = cache(run, "text", "--batch_size", "4", "--json")
    assert code == 0 and [line["state"] for line in json.loads(out)["caches"]] == ["made", "made"]
    for path, known in zip(files, before, strict=True):
        found = load_file(path)
        assert found.keys() == known.keys() and all(torch.equal(found[name], known[name]) for name in known)


def test_a_bad_picture_fails_alone_with_exit_code_8(place: Path, run: Run) -> None:
    Path("set/controls/a.png").write_bytes(b"no picture")
    code, out, err = cache(run, "latents")
    assert code == 8 and out.split() == ["set/cache/b_0040x0036_qie.safetensors"]
    assert "a.png must be" in err and "1 made  0 kept  1 failed" in err and "got 1 that failed" in err


def test_wrong_usage_is_told_before_a_model_is_opened(place: Path, run: Run) -> None:
    assert run("extract", "--dataset-config", "set/dataset.toml")[0] == 2
    assert run("extract", "--cache", "latents")[0] == 2
    assert cache(run, "text", "picture.png")[0] == 2
    assert cache(run, "text", "--batch_size", "0")[0] == 2
    assert run("extract", "--dataset-config", "none.toml", "--cache", "text")[0] == 3
    Path("set/dataset.toml").write_text(CONFIG + "seed = 3\n")
    code, _, err = cache(run, "text")
    assert code == 3 and "keys out of image_directory" in err and "got 'seed'" in err
