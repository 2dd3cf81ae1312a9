"""Datasets: the documented TOML is read, and what a trainer finds in the caches is what the encoders give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import EditRequest, Engine, GenerateRequest
from qengine.engine.dataset import (
    Dataset,
    VaeAlone,
    bucket,
    cache_items,
    control_size,
    fit,
    list_items,
    read_config,
    stale_files,
)
from qengine.engine.dataset.cache import Maker
from qengine.engine.picture import load_picture, to_tensor
from qengine.engine.vae import ImageVAE
from qengine.errors import CheckpointError, InputError
from safetensors import safe_open
from zpipelines import shared_zimage

SAMPLE = """
# general configurations
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "images"
control_directory = "controls"
cache_directory = "cache" # optional
num_repeats = 1
no_resize_control = false # optional, default is false. Disable resizing of control image
control_resolution = [1024, 1024] # optional, default is None. Specify the resolution of the control image.

[[datasets]]
image_jsonl_file = "metadata.jsonl"
cache_directory = "cache2"
resolution = [512, 512]
enable_bucket = false
batch_size = 4
qwen_image_edit_no_resize_control = true
"""
SMALL = '[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nenable_bucket = true\n\n[[datasets]]\n'
SMALL += 'image_directory = "images"\ncontrol_directory = "controls"\ncache_directory = "cache"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "dataset.toml"
    path.write_text(text)
    return path


def gradient(width: int, height: int, tone: int) -> Image.Image:
    image = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", (image, image.point(lambda v: 255 - v), Image.new("L", image.size, tone)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures with captions and controls, one picture with two controls."""
    for name in ("images", "controls"):
        (tmp_path / name).mkdir()
    for number, (name, size) in enumerate({"a": (80, 48), "b": (40, 90)}.items()):
        gradient(*size, number * 90).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "images" / f"{name}.txt").write_text(f"a picture {name}\n")
    gradient(50, 70, 10).save(tmp_path / "controls" / "a.jpg")
    for number, size in ((1, (64, 33)), (0, (90, 90))):
        gradient(*size, 200).save(tmp_path / "controls" / f"b_{number:04d}.png")
    return tmp_path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Engine.open(shared_pipeline("edit-2509"), device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_M39_the_documented_sample_is_read(tmp_path: Path) -> None:
    first, second = read_config(write(tmp_path, SAMPLE))
    assert first == Dataset(
        image_directory=tmp_path / "images",
        control_directory=tmp_path / "controls",
        cache_directory=tmp_path / "cache",
        resolution=(960, 544),
        caption_extension=".txt",
        enable_bucket=True,
        control_resolution=(1024, 1024),
    )
    assert second == Dataset(
        image_jsonl_file=tmp_path / "metadata.jsonl",
        cache_directory=tmp_path / "cache2",
        resolution=(512, 512),
        caption_extension=".txt",
        no_resize_control=True,
        batch_size=4,
    )
    (beside,) = read_config(write(tmp_path, '[[datasets]]\nimage_directory = "/far/images"\nresolution = 512'))
    assert beside.cache_directory == Path("/far/images") and beside.resolution == (512, 512)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution = 1", "keys out of general, datasets, got 'resolution'"),
        ("[general]\nsize = 3\n[[datasets]]", "keys out of resolution, caption_extension"),
        ('[[datasets]]\nimage_directory = "a"\nimage_dir = "b"', "keys out of image_directory, .* got 'image_dir'"),
        ('[[datasets]]\nvideo_directory = "a"', "must be of pictures"),
        ("[general]\nresolution = [960, 544]", "must hold"),
        ("[[datasets]]\nnum_repeats = 2", "image_directory or image_jsonl_file, got 0"),
        ('[[datasets]]\nimage_directory = "a"\nimage_jsonl_file = "b"', "got 2"),
        ('[[datasets]]\nimage_jsonl_file = "b"', "must have cache_directory"),
        ('[[datasets]]\nimage_directory = "a"\nresolution = [960]', r"must be \[width, height\]"),
        ('[[datasets]]\nimage_directory = "a"\nresolution = [950, 544]', "multiples of 16"),
        ('[[datasets]]\nimage_directory = "a"\nenable_bucket = 1', "must be true or false"),
        ('[[datasets]]\nimage_directory = "a"\nnum_repeats = 0', "whole number above 0"),
        ('[[datasets]]\nimage_directory = "a"\ncaption_extension = "txt"', 'must be like ".txt"'),
        ('[[datasets]]\nimage_directory = "a"\n[[datasets]]\nimage_directory = "a"', "of its own"),
        ("[[datasets]\n", "must be a TOML file"),
    ],
)
def test_what_is_no_picture_dataset_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_config(write(tmp_path, text))


def test_captions_and_controls_are_found_by_name(folder: Path) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    gradient(16, 16, 0).save(folder / "images" / "bare.png")
    gradient(16, 16, 0).save(folder / "images" / "alone.png")
    (folder / "images" / "alone.txt").write_text("x")
    gradient(16, 16, 0).save(folder / "images" / "a.webp")
    items, notes = list_items(dataset)
    names = {item.path.name: item for item in items}
    assert names["a.webp"].caption is None and names["a.webp"].error is not None, "a.png has the same name"
    assert [path.name for path in names["a.png"].controls] == ["a.jpg"]
    assert names["b.png"].caption == "a picture b"
    assert [path.name for path in names["b.png"].controls] == ["b_0000.png", "b_0001.png"]
    assert names["alone.png"].error is not None and "must have a control" in names["alone.png"].error.message
    assert "bare.png" not in names and "1 picture(s)" in notes[0] and "bare.png" in notes[0]


def test_a_list_of_pictures_is_read_and_a_bad_line_fails_alone(folder: Path) -> None:
    lines = [
        {"image_path": "images/a.png", "caption": "one", "control_path_1": "y.png", "control_path_0": "x.png"},
        {"image_path": "images/b.png", "caption": 3},
        {"caption": "no picture"},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnonsense\n"
    (folder / "list.jsonl").write_text(text)
    config = '[[datasets]]\nimage_jsonl_file = "list.jsonl"\ncache_directory = "cache"\n'
    (dataset,) = read_config(write(folder, config))
    items, _ = list_items(dataset)
    assert items[0].path == folder / "images/a.png" and items[0].caption == "one"
    assert [path.name for path in items[0].controls] == ["x.png", "y.png"]
    assert [item.error is None for item in items] == [True, False, False, False]


def test_sizes_are_those_of_the_documentation() -> None:
    here = Path()
    fixed = Dataset(cache_directory=here, resolution=(960, 544))
    assert bucket((100, 900), fixed) == (960, 544)
    shaped = Dataset(cache_directory=here, resolution=(960, 544), enable_bucket=True)
    for size in ((960, 544), (1024, 1024), (300, 900), (900, 300)):
        width, height = bucket(size, shaped)
        assert width % 16 == height % 16 == 0 and width * height <= 960 * 544
        assert width * height > 0.93 * 960 * 544
    assert bucket((1024, 1024), shaped) == (720, 720) and bucket((960, 544), shaped) == (960, 544)
    small = Dataset(cache_directory=here, resolution=(960, 544), enable_bucket=True, bucket_no_upscale=True)
    assert bucket((333, 200), small) == (320, 192)
    assert control_size((512, 512), (960, 544), shaped) == (960, 544)
    kept = Dataset(cache_directory=here, no_resize_control=True)
    assert control_size((515, 530), (960, 544), kept) == (512, 528)
    official = Dataset(cache_directory=here, control_resolution=(1024, 1024))
    assert control_size((512, 512), (960, 544), official) == (1024, 1024)
    both = Dataset(cache_directory=here, control_resolution=(1024, 1024), no_resize_control=True)
    assert control_size((512, 512), (960, 544), both) == (512, 512)
    assert control_size((2048, 2048), (960, 544), both) == (1024, 1024)
    with pytest.raises(InputError, match="at least 16"):
        control_size((512, 9), (960, 544), kept)


def test_pictures_cover_their_size_and_lose_their_edges_evenly() -> None:
    image = Image.new("RGB", (100, 50), "red")
    image.paste("blue", (25, 0, 75, 50))
    assert fit(image, (50, 50)).getcolors() == [(2500, (0, 0, 255))]
    assert fit(image, (100, 50)) is image and fit(image, (300, 200)).size == (300, 200)


def test_M37_cached_latents_are_those_of_the_encoder_and_so_are_the_controls(folder: Path, engine: Engine) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    items, _ = list_items(dataset)
    made = list(cache_items(Maker(engine, "latents", dataset), items))
    names = [cache.path.name for cache in made if cache.path is not None]
    assert names == ["a_0080x0048_qie.safetensors", "b_0040x0090_qie.safetensors"]
    vae = ImageVAE.load(engine.source.vae, device=torch.device("cpu"), dtype=torch.float32)
    for cache, item in zip(made, items, strict=True):
        assert cache.path is not None
        found, header = tensors(cache.path)
        assert header["architecture"] == "qwen_image" and header["format_version"] == "1.0.1"
        target = bucket(load_picture(item.path).image.size, dataset)
        shown = [item.path, *item.controls]
        assert len(found) == len(shown)
        for number, path in enumerate(shown):
            latents = vae.encode(to_tensor(fit(load_picture(path).image, target)))[0]
            what = "latents" if number == 0 else f"latents_control_{number - 1}"
            size = f"1x{target[1] // 8}x{target[0] // 8}"
            assert torch.equal(found[f"{what}_{size}_float32"], latents)


def test_M37_a_vae_alone_gives_the_same_latents(folder: Path, engine: Engine) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    items, _ = list_items(dataset)
    made = list(cache_items(Maker(engine, "latents", dataset), items))
    known = [tensors(cache.path)[0] for cache in made if cache.path is not None]
    alone = VaeAlone.open(shared_pipeline("edit-2509") / "vae", edits=True, device="cpu", dtype="auto")
    again = list(cache_items(Maker(alone, "latents", dataset), items))
    assert [cache.path for cache in again] == [cache.path for cache in made]
    for cache, latents in zip(again, known, strict=True):
        assert cache.path is not None and cache.state == "made"
        found = tensors(cache.path)[0]
        assert found.keys() == latents.keys() and all(torch.equal(found[name], latents[name]) for name in found)
    (failed, _) = cache_items(Maker(alone, "text", dataset), items)
    assert failed.error is not None and "by a text encoder" in failed.error.message


def test_only_models_of_the_qwen_image_family_are_cached_for(folder: Path) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    with Engine.open(shared_zimage(), device="cpu") as other, pytest.raises(CheckpointError, match="Qwen-Image family"):
        Maker(other, "latents", dataset)


@pytest.mark.parametrize("kind", ["edit-2509", "qwen-image"])
def test_M38_cached_embeddings_are_those_of_the_encoder(folder: Path, engine: Engine, kind: str) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    items, _ = list_items(dataset)
    own = engine if kind == "edit-2509" else Engine.open(shared_pipeline(kind), device="cpu", cache_dir=folder / "own")
    made = list(cache_items(Maker(own, "text", dataset), items))
    short = "qie" if kind == "edit-2509" else "qi"
    assert [cache.path.name for cache in made if cache.path] == [f"{n}_{short}_te.safetensors" for n in "ab"]
    for cache, item in zip(made, items, strict=True):
        assert cache.path is not None and item.caption is not None
        found, header = tensors(cache.path)
        request = GenerateRequest(prompt=item.caption, true_cfg_scale=1)
        if kind == "edit-2509":
            request = EditRequest(images=item.controls, prompt=item.caption, true_cfg_scale=1)
        with Engine.open(shared_pipeline(kind), device="cpu", cache_dir=folder / "direct") as direct:
            embeds = direct.encode(request).conditioning.prompt_embeds
        assert header["caption1"] == item.caption and list(found) == ["varlen_vl_embed_float32"]
        assert torch.equal(found["varlen_vl_embed_float32"], embeds)
    own.close()


def test_what_is_up_to_date_is_kept_and_what_changed_is_made_anew(folder: Path, engine: Engine) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    items, _ = list_items(dataset)
    maker = Maker(engine, "latents", dataset)
    assert [cache.state for cache in cache_items(maker, items)] == ["made", "made"]
    assert [cache.state for cache in cache_items(maker, items)] == ["kept", "kept"]
    gradient(50, 70, 11).save(folder / "controls" / "a.jpg")
    assert [cache.state for cache in cache_items(maker, items)] == ["made", "kept"]
    gradient(50, 70, 12).save(folder / "controls" / "a.jpg")
    keeping = Maker(engine, "latents", dataset, keep=True)
    assert [cache.state for cache in cache_items(keeping, items)] == ["kept", "kept"]
    other = Maker(engine, "latents", dataset, surroundings={"vae_weights": "int8"})
    assert [cache.state for cache in cache_items(other, items)] == ["made", "made"]
    (dataset.cache_directory / "a_0080x0048_qie.safetensors").write_bytes(b"cut")
    assert [cache.state for cache in cache_items(other, items)] == ["made", "kept"]


def test_a_bad_picture_fails_alone_and_leaves_nothing(folder: Path, engine: Engine) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    (folder / "images" / "a.png").write_bytes(b"no picture")
    items, _ = list_items(dataset)
    made = list(cache_items(Maker(engine, "latents", dataset), items))
    assert [cache.state for cache in made] == ["failed", "made"] and made[0].error is not None
    assert [path.name for path in dataset.cache_directory.iterdir()] == ["b_0040x0090_qie.safetensors"]
    (folder / "images" / "b.txt").write_text("  \n")
    items, _ = list_items(dataset)
    text = list(cache_items(Maker(engine, "text", dataset), items))
    assert [cache.state for cache in text] == ["made", "failed"], "a caption needs its controls alone"


def test_only_our_own_files_of_pictures_that_are_gone_are_stale(folder: Path, engine: Engine) -> None:
    (dataset,) = read_config(write(folder, SMALL))
    items, _ = list_items(dataset)
    maker = Maker(engine, "latents", dataset)
    list(cache_items(maker, items))
    (dataset.cache_directory / "z_0010x0010_qie.safetensors").write_bytes(b"of another")
    made = list(cache_items(maker, items[1:]))
    assert [path.name for path in stale_files(maker, made)] == ["a_0080x0048_qie.safetensors"]
    (folder / "images" / "a.png").write_bytes(b"no picture")
    made = list(cache_items(maker, items))
    assert stale_files(maker, made) == [], "a picture that failed is still in the dataset"
