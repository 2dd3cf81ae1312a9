"""qengine stats: the numbers of a text encoder, where they are kept, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qengine.engine.vl import Knobs, RawExtraction, condition, default_path, read_statistics
from qengine.engine.vl.reference import PROMPTS
from qengine.engine.zimage import ZImageEncoder
from qengine.errors import RequestError
from zpipelines import open_zimage, shared_zimage

Run = Callable[..., tuple[int, str, str]]
PHRASES = ("a cat", "a red bicycle at night", "a cat", "zwei Hunde")


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path / "cache"))


def encoder() -> str:
    return str(shared_zimage() / "text_encoder")


def rows(prompts: tuple[str, ...]) -> np.ndarray:
    """Embeddings of the prompts, one below the other, float64; each prompt encoded by itself."""
    alone = ZImageEncoder(open_zimage(shared_zimage()), torch.device("cpu"), torch.float32)
    return torch.cat([alone.encode([prompt])[0] for prompt in prompts]).double().numpy()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".json"])
def test_V15_the_command_gives_the_mean_and_std_of_numpy_in_every_format(run: Run, folder: Path, suffix: str) -> None:
    Path("prompts.txt").write_text("\n".join(["# ours", *PHRASES, ""]), encoding="utf-8")
    code, out, err = run("stats", "--text-encoder", encoder(), "--prompts", "prompts.txt", "-o", f"stats{suffix}")
    assert code == 0 and out.strip() == f"stats{suffix}" and "4 prompts" in err and "layer -2" in err
    found, expected = read_statistics(f"stats{suffix}"), rows(PHRASES)
    assert np.allclose(found.mean.numpy(), expected.mean(axis=0), atol=1e-5)
    assert np.allclose(found.std.numpy(), expected.std(axis=0, ddof=1), rtol=1e-5)
    assert found.global_mean == pytest.approx(expected.mean(), abs=1e-6)
    assert found.global_std == pytest.approx(expected.std(ddof=1), rel=1e-5)
    assert not np.allclose(found.std.numpy(), expected.std(axis=0), rtol=1e-5)
    if suffix != ".npz":
        model = open_zimage(shared_zimage()).text_encoder.checkpoint.fingerprint
        told = (found.layer, found.model, found.prompts, found.num_tokens)
        assert told == (-2, model, PHRASES, len(expected))


def test_V15_without_a_file_they_go_where_runs_look_and_that_is_said(run: Run, folder: Path) -> None:
    code, out, err = run("stats", "--text-encoder", str(shared_zimage()), "--json")
    told = json.loads(out)
    assert code == 0 and told["statistics"] == str(default_path()) and "in the cache" in err
    assert told["ddof"] == 1 and told["num_prompts"] == len(PROMPTS) and told["hidden_dim"] == 48
    found = read_statistics(default_path())
    assert found.prompts == PROMPTS and told["num_tokens"] == found.num_tokens


def test_V15_an_npz_holds_no_pickle_and_says_what_it_is_of(run: Run, folder: Path) -> None:
    run("stats", "--text-encoder", encoder(), "-o", "s.npz", "-q")
    with np.load("s.npz", allow_pickle=False) as archive:
        about = json.loads(str(archive["about"]))
    assert about["ddof"] == 1 and about["layer"] == -2 and about["prompts"] == list(PROMPTS)


def test_V15_a_whole_model_gives_the_numbers_of_its_encoder_alone(run: Run, folder: Path) -> None:
    Path("prompts.txt").write_text("a cat\na red bicycle at night\n")
    asked = ("--prompts", "prompts.txt", "--device", "cpu")
    code, _, err = run("stats", str(shared_zimage()), *asked, "-o", "model.json")
    assert code == 0 and "z-image-turbo" in err
    assert run("stats", "--text-encoder", encoder(), *asked, "-o", "alone.json", "-q")[0] == 0
    model, alone = read_statistics("model.json"), read_statistics("alone.json")
    assert (model.layer, model.model, model.num_tokens) == (alone.layer, alone.model, alone.num_tokens)
    assert torch.allclose(model.std, alone.std, rtol=1e-5) and torch.allclose(model.mean, alone.mean, atol=1e-5)


def test_V15_prompts_come_from_stdin(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat\n\na dog\n"))
    code, _, _ = run("stats", "--text-encoder", encoder(), "--prompts", "-", "-o", "s.json", "-q")
    assert code == 0 and read_statistics("s.json").prompts == ("a cat", "a dog")


def test_V15_statistics_of_another_width_are_refused_where_they_are_used(run: Run, folder: Path) -> None:
    run("stats", "--text-encoder", encoder(), "-o", "s.safetensors", "-q")
    raw = RawExtraction(
        hidden={-6: torch.randn(4, 64)},
        input_ids=torch.arange(4, dtype=torch.int32),
        segments=torch.zeros(4, dtype=torch.uint8),
        grid_thw=torch.zeros(0, 3, dtype=torch.int32),
        prompt="",
    )
    with pytest.raises(RequestError, match="must have 64 columns as the embeddings, got 48"):
        condition(raw, Knobs(normalization_mode="per_dim"), statistics="s.safetensors")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "must get one text encoder, got 0"),
        (("model", "--text-encoder", "dir"), 2, "must get one text encoder, got 2"),
        (("model", "--tokenizer", "dir"), 2, "--tokenizer must come with --text-encoder"),
        (("--text-encoder", "nothing"), 4, "text encoder must be a folder or a safetensors file"),
        (("--text-encoder", "photo.png"), 4, "photo.png"),
        (("--text-encoder", "E", "--prompts", "none.txt"), 3, "none.txt must be a text file"),
        (("--text-encoder", "E", "--prompts", "photo.png"), 3, "photo.png must be a text file"),
        (("--text-encoder", "E", "--prompts", "empty.txt"), 3, "must hold 1 to 10000 prompts"),
        (("--text-encoder", "E", "-o", "stats.pt"), 2, "must be a file that ends in .safetensors, .npz, .json"),
        (("--text-encoder", "E", "--vram", "4GiB"), 2, "--vram must come with --model"),
        (("--text-encoder", "E", "-o", "no/such/photo.png/s.json"), 2, None),
    ],
)
def test_V15_what_cannot_be_measured_is_refused(
    run: Run, folder: Path, words: tuple[str, ...], code: int, said: str | None
) -> None:
    Path("empty.txt").write_text("\n# nothing\n")
    (Path("no") / "such").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save("no/such/photo.png")
    got, out, err = run("stats", *(encoder() if word == "E" else word for word in words))
    assert got == code or (said is None and got != 0)
    assert out == "" and (said is None or said in err) and "Traceback" not in err
    assert not list(Path.cwd().rglob("*.part")) and not default_path().exists()
