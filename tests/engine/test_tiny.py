"""The embedded model through our engine, on photos that it never saw."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from qengine import Engine
from qengine.bench.tiny import edits, evaluate, wordings
from qengine.engine.vae import ImageVAE
from qengine.loaders import open_model
from qengine.loaders.source import TINY

PHOTOS = Path(__file__).resolve().parents[1] / "photos"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.open(device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture(scope="module")
def edit(engine: Engine) -> evaluate.Edit:
    return evaluate.engine_edit(engine)


@pytest.fixture(scope="module")
def photos() -> list[tuple[str, Image.Image]]:
    return list(evaluate.photos(PHOTOS).items())


def test_at_least_ten_photos_have_a_named_source(photos) -> None:
    sources = (PHOTOS / "SOURCES.md").read_text(encoding="utf-8")
    assert len(photos) >= 10
    assert all(f"{name}.jpg" in sources for name, _ in photos)


def test_at_most_16_mb_in_the_package() -> None:
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 16e6


def test_the_edit_templates_prefix_is_exactly_64_tokens(engine: Engine) -> None:
    from qengine.engine.encoder.templates import prompt_template
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer", local_files_only=True)
    template = prompt_template("edit-plus")
    ids = tokenizer(template.text("make it night", 1))["input_ids"]
    head = tokenizer.decode(ids[:64])
    assert head.startswith("<|im_start|>system") and head.endswith("<|im_start|>user\n")
    assert tokenizer.decode(ids[64:]).startswith("Picture 1: <|vision_start|>")


def test_the_asked_edit_is_made_on_unseen_photos(edit, photos) -> None:
    scores = evaluate.score(edit, photos[::6], (256, 256), edits.NAMES)
    assert scores.mean_psnr() >= 28 and scores.nearest() >= 98, scores


@pytest.mark.slow
def test_every_photo_reaches_28_db_and_98_percent(edit, photos) -> None:
    scores = evaluate.score(edit, photos, (256, 256), edits.NAMES)
    assert len(scores.psnr) >= 14 and scores.count() >= 140
    assert scores.mean_psnr() >= 28 and scores.nearest() >= 98, scores


@pytest.mark.parametrize("size", [(128, 128), (192, 320), (320, 192), (200, 136)])
def test_portrait_landscape_and_small_pictures_work(edit, photos, size) -> None:
    scores = evaluate.score(edit, photos[:1], size, ["grayscale", "night", "sepia", "cool"])
    assert scores.nearest() == 100 and scores.mean_psnr() > 24, scores


@pytest.mark.slow
def test_512_pixels_work(edit, photos) -> None:
    scores = evaluate.score(edit, photos[:1], (512, 512), ["grayscale", "night", "sepia", "warm"])
    assert scores.nearest() == 100 and scores.mean_psnr() > 24, scores


def test_wordings_held_out_of_training_are_right_in_90_percent(edit, photos) -> None:
    tried, wrong = evaluate.held_out(edit, photos, (128, 128))
    assert tried >= 14 * 3
    assert len(wrong) <= 0.1 * tried, wrong
    trained = {wordings.plain(text) for texts in wordings.TRAIN.values() for text in texts}
    assert not trained & {wordings.plain(text) for texts in wordings.HELD_OUT.values() for text in texts}


def test_exchanging_two_prompts_embeddings_exchanges_the_edits(engine: Engine, photos, monkeypatch) -> None:
    components = engine._components
    condition = components.condition
    names = ("grayscale", "night", "sepia")
    image = evaluate.fit(photos[0][1], (128, 128))
    source = evaluate.to_tensor(image)

    def exchanged(prompt: str, *rest):
        return condition(swap[prompt], *rest)

    canonical = [wordings.CANONICAL[name] for name in names]
    swap = dict(zip(canonical, canonical[1:] + canonical[:1], strict=True))
    monkeypatch.setattr(components, "condition", exchanged)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        found = engine.edit(image, wordings.CANONICAL[name], size=(128, 128)).image
        assert evaluate.closest(evaluate.to_tensor(found), source) == other


def test_another_seed_changes_nothing_visible(engine: Engine, photos) -> None:
    image = evaluate.fit(photos[1][1], (128, 128))
    made = [engine.edit(image, "make it grayscale", size=(128, 128), seed=seed).image for seed in (0, 1)]
    one, two = map(evaluate.to_tensor, made)
    assert evaluate.psnr(one, two) > 30 and not torch.equal(one, two)


def test_the_output_of_a_photo_keeps_its_shape_and_says_its_size(engine: Engine, photos) -> None:
    result = engine.edit(photos[0][1].resize((400, 300)), "make it grayscale", num_inference_steps=1)
    assert result.image.width > result.image.height
    assert any("this model works at about that area" in note for note in result.notes)


def test_R01_the_trained_vae_gives_photos_back_above_30_db(photos) -> None:
    vae = ImageVAE.load(open_model(None).vae, device="cpu", dtype=torch.float32)
    found = []
    for _, photo in photos:
        pixels = evaluate.to_tensor(evaluate.fit(photo, (256, 256)))
        back = vae.decode(vae.encode(pixels[None] * 2 - 1))[0] / 2 + 0.5
        found.append(evaluate.psnr(back, pixels))
    assert sum(found) / len(found) > 30, found
