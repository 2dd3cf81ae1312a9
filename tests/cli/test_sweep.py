"""qengine generate with a picture that is read: files, grid, record, what is done once, what goes wrong alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from qengine.cli import backend, main
from qengine.cli.app import root
from qengine.cli.axes import numbers_of
from qengine.cli.cells import command_of
from qengine.engine.grid import layout
from qengine.engine.request import GenerateRequest
from qengine.engine.session import Engine
from qengine.engine.vl import VLEmbeddingExtractor
from qengine.errors import RequestError
from vlpipelines import shared_vl
from zpipelines import build_zimage

Run = Callable[..., tuple[int, str, str]]
GRID = ("--alphas", "0", "0.5", "--strengths", "0.5", "1")
NAMES = [f"alpha_{alpha}_strength_{strength}.png" for alpha in ("0.00", "0.50") for strength in ("0.50", "1.00")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QENGINE_CACHE", str(root / "cache"))
        yield str(build_zimage(root / "tiny-z-image-turbo", cap_feat_dim=64))


def line(model: str, place: str = "photo.png") -> list[str]:
    """A command line without the values to try; the photo is read and started from."""
    plain = [
        "generate",
        "a cat",
        "--model",
        model,
        "--device",
        "cpu",
        "--size",
        "32x32",
        "--steps",
        "2",
        "--seed",
        "42",
    ]
    return [*plain, "--vl-model", str(shared_vl()), "--vl-device", "cpu", "-i", place]


@pytest.fixture
def words(model: str, folder: Path) -> list[str]:
    return line(model)


class Log(list[str]):
    """Loads and frees of the engine, told to another list too."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def append(self, word: str) -> None:
        self.events.append(word)

    def __iadd__(self, words: Any) -> Log:
        self.events.extend(words)
        return self


def listening(patch: pytest.MonkeyPatch) -> list[str]:
    """What is read, loaded and freed from now on, in order."""
    found: list[str] = []
    real, raw, unload = backend.open_engine, VLEmbeddingExtractor.raw, VLEmbeddingExtractor.unload

    def open_engine(progress: Any, **choice: Any) -> Engine:
        engine = real(progress, **choice)
        engine._components.log = Log(found)
        return engine

    def reading(extractor: Any, *arguments: Any, **options: Any) -> Any:
        found.append("read pictures")
        return raw(extractor, *arguments, **options)

    def unloading(extractor: Any) -> None:
        unload(extractor)
        assert extractor.tape is None
        found.append("free extractor")

    patch.setattr(backend, "open_engine", open_engine)
    patch.setattr(VLEmbeddingExtractor, "raw", reading)
    patch.setattr(VLEmbeddingExtractor, "unload", unloading)
    return found


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return listening(monkeypatch)


@dataclass(frozen=True)
class Made:
    """One sweep of two shares and two strengths."""

    folder: Path
    events: list[str]
    record: dict[str, Any]


@pytest.fixture(scope="module")
def made(model: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    Image.new("RGB", (40, 20), (200, 10, 10)).save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        events = listening(patch)
        assert main([*line(model), *GRID, "-o", "out/"]) == 0
    return Made(folder / "out", events, json.loads((folder / "out" / "sweep.json").read_text()))


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def files(place: str | Path = "out") -> Iterator[str]:
    return (path.name for path in sorted(Path(place).iterdir()) if not path.name.startswith("."))


def test_S19_a_sweep_writes_its_pictures_and_the_row_of_alpha_0_is_the_run_without_a_picture(
    made: Made, model: str
) -> None:
    assert list(files(made.folder)) == [*NAMES, "grid.png", "manifest.jsonl", "sweep.json", "sweep.qx"]
    with Engine.open(model, device="cpu") as engine:
        for strength in (0.5, 1.0):
            request = GenerateRequest(
                prompt="a cat",
                size=(32, 32),
                num_inference_steps=2,
                seed=42,
                init_image=made.folder.parent / "photo.png",
                strength=strength,
            )
            *_, plain = engine.stream(request)
            named = f"strength_{strength:.2f}.png"
            assert np.array_equal(pixels(made.folder / f"alpha_0.00_{named}"), np.asarray(plain.image))
            assert not np.array_equal(pixels(made.folder / f"alpha_0.50_{named}"), np.asarray(plain.image))


def test_S20_the_picture_is_encoded_once_for_a_sweep(made: Made) -> None:
    assert made.events.count("read pictures") == 1
    assert made.events.count("load text_encoder") == 1 and made.events.count("load transformer") == 1


def test_V34_what_reads_the_picture_is_freed_before_anything_else_is_loaded(made: Made) -> None:
    assert made.events[:3] == ["read pictures", "free extractor", "load text_encoder"]
    assert made.events.count("free extractor") == 1
    assert made.events.index("load text_encoder") < made.events.index("load transformer")


def test_S21_the_grid_is_columns_by_rows_of_cells(made: Made) -> None:
    grid = pixels(made.folder / "grid.png")
    title = '"a cat", seed 42, 2 steps, interpolate, layer -6, tokens all'
    plan = layout((32, 32), ["alpha 0.00", "alpha 0.50"], ["strength 0.50", "strength 1.00"], title)
    assert grid.shape == (plan.size[1], plan.size[0], 3)
    for number, name in enumerate(NAMES):
        x, y = plan.place(*divmod(number, 2))
        assert np.array_equal(grid[y : y + 32, x : x + 32], pixels(made.folder / name))


@pytest.mark.slow
def test_a_record_says_how_to_make_the_same_again(
    run: Run, made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = made.record
    assert record["format"] == "qengine-sweep-1" and record["grid"] == "grid.png"
    assert record["model"]["variant"] == "z-image-turbo" and len(record["model"]["fingerprint"]) == 64
    assert record["request"]["seed"] == 42 and record["knobs"]["hidden_layer"] == -6
    assert record["alphas"] == [0.0, 0.5] and record["strengths"] == [0.5, 1.0]
    assert list(record["inputs"]) == ["photo.png"] and record["blend"]["mode"] == "interpolate"
    assert [cell["files"] for cell in record["cells"]] == [[name] for name in NAMES]
    assert str(made.folder) not in json.dumps({**record, "command": None})
    monkeypatch.chdir(made.folder.parent)
    assert run(*record["command"][1:], "-o", str(folder / "again"), "-q")[0] == 0
    for name in (*NAMES, "grid.png"):
        assert np.array_equal(pixels(made.folder / name), pixels(folder / "again" / name))


def test_rerun_makes_a_cell_again_from_what_was_read(run: Run, made: Made, folder: Path) -> None:
    code, _, err = run("rerun", str(made.folder / NAMES[2]), "--init-image", "photo.png", "-o", "again.png")
    assert code == 0 and "Traceback" not in err
    assert np.array_equal(pixels("again.png"), pixels(made.folder / NAMES[2]))


def test_a_sweep_goes_on_from_what_was_read_elsewhere(
    run: Run, made: Made, model: str, folder: Path, events: list[str]
) -> None:
    asked = ["--conditioning", str(made.folder / "sweep.qx"), "--model", model, "--device", "cpu", "--seed", "42"]
    code, _, _ = run(
        "generate", *asked, "--steps", "2", "--alphas", "0", "0.5", "--strengths", "1", "-o", "there", "-q"
    )
    assert code == 0 and not {"read pictures", "load text_encoder"} & set(events)
    for name in (NAMES[1], NAMES[3]):
        assert np.array_equal(pixels(f"there/{name}"), pixels(made.folder / name))


def test_S15_another_picture_to_start_from_is_allowed_with_a_warning(run: Run, words: list[str], made: Made) -> None:
    two = [*words[:-2], "--vl-image", "photo.png", "--init-image"]
    code, _, err = run(*two, "other.png", "--strength", "0.5", "--alpha", "0.5", "-o", "two.png")
    assert code == 0 and "the picture that the run starts from is not the one that was read" in err
    code, _, err = run(*two, "photo.png", "--strength", "0.5", "--alpha", "0.5", "-o", "one.png")
    assert code == 0 and "is not the one that was read" not in err
    assert np.array_equal(pixels("one.png"), pixels(made.folder / NAMES[2]))
    assert not np.array_equal(pixels("one.png"), pixels("two.png"))


@pytest.mark.slow
def test_resume_makes_what_is_missing_and_opens_nothing_where_nothing_is(
    run: Run, words: list[str], events: list[str]
) -> None:
    line = [*words, "--alphas", "0", "0.5", "-o", "out/"]
    assert run(*line, "-q")[0] == 0
    first = {name: pixels(f"out/{name}") for name in ("alpha_0.00.png", "alpha_0.50.png", "grid.png")}
    assert run(*line)[0] == 2
    Path("out/alpha_0.50.png").unlink()
    events.clear()
    code, _, err = run(*line, "--resume")
    assert code == 0 and "kept     out/alpha_0.00.png" in err and "1/1  alpha 0.50" in err
    assert "kept     out/sweep.qx" in err and "read pictures" not in events and "load text_encoder" not in events
    events.clear()
    code, out, err = run(*line, "--resume", "--json")
    assert code == 0 and err.count("kept") == 2 and events == []
    assert [each["state"] for each in json.loads(out)["outputs"]] == ["done", "done"]
    assert all(np.array_equal(first[name], pixels(f"out/{name}")) for name in first)
    code, _, _ = run(*line, "--resume", "--seed", "43", "-q")
    assert code == 0 and not np.array_equal(first["alpha_0.00.png"], pixels("out/alpha_0.00.png"))


def test_a_cell_that_fails_alone_is_shown_as_such_and_the_exit_code_is_8(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.stream

    def stream(engine: Engine, request: Any, **options: Any) -> Any:
        if request.strength == 1:
            raise RequestError("steps must be finite, got NaN")
        return real(engine, request, **options)

    monkeypatch.setattr(Engine, "stream", stream)
    code, out, err = run(*words, *GRID, "-o", "out/")
    assert code == 8 and "got 2 that failed" in err and out.split() == ["out/grid.png"]
    assert list(files())[:2] == [NAMES[0], NAMES[2]]
    shown = pixels("out/grid.png")
    assert (shown[-28, -50:-2] == 232).all(axis=1).any()
    states = [cell["state"] for cell in json.loads(Path("out/sweep.json").read_text())["cells"]]
    assert states == ["done", "failed", "done", "failed"]
    monkeypatch.setattr(Engine, "stream", real)
    code, _, err = run(*words, *GRID, "-o", "out/", "--resume")
    assert code == 0 and err.count("kept     out/alpha") == 2 and len(list(files())) == 8
    assert not np.array_equal(shown, pixels("out/grid.png"))


def test_nothing_is_overwritten_that_a_sweep_did_not_make(run: Run, words: list[str]) -> None:
    Path("out").mkdir()
    for name in ("grid.png", "sweep.json", "alpha_0.50_strength_1.00.png"):
        Path("out", name).write_text("mine")
        code, _, err = run(*words, *GRID, "-o", "out")
        assert code != 0 and f"out/{name} must be a new file" in err and Path("out", name).read_text() == "mine"
        Path("out", name).unlink()
        assert list(files()) == []


def test_a_grid_that_is_named_goes_there_and_its_cells_beside_it(run: Run, words: list[str]) -> None:
    Path("g.png").write_text("replaced")
    code, out, _ = run(*words, "--alphas", "0,0.5", "-o", "g.png", "-q")
    assert code == 0 and out.strip() == "g.png" and pixels("g.png").shape[2] == 3
    assert list(files("g")) == ["alpha_0.00.png", "alpha_0.50.png", "manifest.jsonl", "sweep.json", "sweep.qx"]
    code, _, err = run(*words, "--alphas", "0,0.5", "-o", "photo.png", "-q")
    assert code == 2 and "must differ from the input pictures" in err


@pytest.mark.slow
def test_one_cell_is_one_picture_under_the_name_that_was_asked(run: Run, words: list[str]) -> None:
    code, out, _ = run(*words, "--alpha", "0.4", "-o", "one.png", "--json")
    [made] = json.loads(out)["outputs"]
    assert code == 0 and made["image"] == "one.png" and made["seed"] == 42
    assert sorted(path.name for path in Path().iterdir()) == ["one.png", "other.png", "photo.png"]
    code, out, _ = run(*words, "--alphas", "0.4", "-o", "two.png", "-q", "--count", "2")
    assert code == 0 and out.split() == ["two_42.png", "two_43.png"]
    assert np.array_equal(pixels("one.png"), pixels("two_42.png"))
    assert not np.array_equal(pixels("one.png"), pixels("two_43.png"))


def test_S25_where_pictures_are_read_is_told_apart_from_where_they_are_made(
    run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real, raw = backend.open_engine, VLEmbeddingExtractor.raw

    def open_engine(progress: Any, **choice: Any) -> Engine:
        seen["device"] = choice["device"]
        return real(progress, **{**choice, "device": "cpu"})

    def reading(extractor: Any, *arguments: Any, **options: Any) -> Any:
        seen["vl_device"] = str(extractor.encoder._device)
        return raw(extractor, *arguments, **options)

    monkeypatch.setattr(backend, "open_engine", open_engine)
    monkeypatch.setattr(VLEmbeddingExtractor, "raw", reading)
    assert run(*words, "--device", "cuda:1", "-o", "one.png", "-q")[0] == 0
    assert seen == {"device": "cuda:1", "vl_device": "cpu"}


def test_S24_another_width_is_refused_before_a_picture_is_read(
    run: Run, words: list[str], events: list[str], tmp_path: Path
) -> None:
    narrow = build_zimage(tmp_path / "narrow" / "tiny-z-image-turbo")
    code, _, err = run(*words, "--model", str(narrow), "-o", "one.png")
    assert code == 4 and "must have the width that the transformer takes, 48, got 64" in err
    assert "read pictures" not in events and not Path("one.png").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--alphas", "0", "1.5"), 2, "alphas must be from 0 to 1, got 1.5"),
        (("--alphas", "0.3", "0.30"), 2, "alphas must be different"),
        (("--alphas", "0.3", "--alpha", "0.3"), 2, "alpha must be told in one way"),
        (("--alphas", "0.3", "--token-alphas", "0.3"), 2, "--alphas must be the only shares"),
        (("--vl-image", "other.png"), 2, "the picture must be named once"),
        (("--alphas", "0", "1", "--output-type", "latents"), 2, "a sweep must write pictures"),
        (("--alphas", "0", "1", "--count", "2"), 2, "a sweep must have one seed"),
        (("--alphas", "0", "1", "-o", "mine.txt"), 3, "must go into a folder"),
        (("--model", "tiny"), 4, "pictures must be read for Z-Image"),
        (("--vl-model", "nothing"), 4, "Qwen3-VL must be a folder"),
        (("--normalization-mode", "per_dim"), 2, "must have reference statistics"),
    ],
)
def test_what_cannot_be_swept_is_refused(
    run: Run, words: list[str], more: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QENGINE_CACHE", "empty_cache")
    Path("mine.txt").write_text("mine")
    got, out, err = run(*words, *more)
    assert (got, out) == (code, "") and said in err and "Traceback" not in err
    assert Path("mine.txt").read_text() == "mine"


def test_a_picture_needs_a_reader_and_a_reader_a_picture(run: Run, model: str, folder: Path) -> None:
    plain = ("generate", "a cat", "--model", model)
    for more, said in {
        ("-i", "photo.png"): "got no --vl-model",
        ("--vl-model", "vl"): "--vl-model must come with a picture to read",
        ("--alphas", "0", "1"): "alpha must stand beside a picture that is read",
        ("--strengths", "0.1", "1"): "strength must stand beside a picture to start from",
        ("--vl-model", "vl", "-i", "none.png"): "none.png must be a picture",
    }.items():
        code, _, err = run(*plain, *more)
        assert code in (2, 3) and said in err


def test_numbers_are_read_with_spaces_and_commas() -> None:
    assert numbers_of("alphas", ("0", "0.3,0.5", ".7,")) == (0.0, 0.3, 0.5, 0.7)
    with pytest.raises(RequestError, match="--alphas must be numbers"):
        numbers_of("alphas", ("0..3",))


def test_the_command_of_a_record_says_a_filled_template_as_the_prompt_that_it_is() -> None:
    words = ["--template", "style", "--alphas", "0", "0.5", "--think", "--strengths", "0.5,1", "-m", "z", "-o", "out"]
    command: Any = root().get_command(click.Context(root()), "generate")
    said = command_of("a cat in oil", command.make_context("generate", words).params)
    assert said == [
        *("qengine", "generate", "--prompt=a cat in oil", "--alphas=0", "--alphas=0.5", "--strengths=0.5,1"),
        *("--think", "--model=z"),
    ]
