"""The names that Z-Image's users know, over the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import qengine
import torch
from PIL import Image
from qengine import Engine, ZImagePipeline
from qengine.errors import CheckpointError, RequestError
from vlpipelines import picture
from zpipelines import shared_zimage

SEEDS_NAMES = (
    *("VLEmbeddingExtractor", "mask_outlier_dimensions", "get_outlier_dimensions", "compute_style_delta"),
    *("blend_with_style_delta", "blend_adain", "blend_adain_per_dim", "blend_interpolate", "blend_embeddings"),
    "ZImagePipeline",
)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> ZImagePipeline:
    cache = tmp_path_factory.mktemp("cache")
    return ZImagePipeline.from_pretrained(shared_zimage(), torch_dtype=torch.float32, device="cpu", cache_dir=cache)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def test_every_name_of_the_guides_is_importable_from_the_package() -> None:
    for name in SEEDS_NAMES:
        assert name in qengine.__all__
        assert callable(getattr(qengine, name))


def test_S14_embeddings_are_the_prompt_bit_by_bit(pipe: ZImagePipeline) -> None:
    embeds = pipe.encode_prompt("Homer Simpson")
    assert embeds.dim() == 2 and embeds.device.type == "cpu"
    options = {"width": 48, "height": 32, "num_inference_steps": 1, "generator": 42}
    [words] = pipe("Homer Simpson", **options).images
    for given in (embeds, embeds[None], [embeds]):
        assert np.array_equal(pixels(pipe(prompt_embeds=given, **options).images[0]), pixels(words))
    start = {"image": picture(48, 32), "strength": 0.5, "num_inference_steps": 2, "generator": 42}
    [words] = pipe.img2img(prompt="Homer Simpson", **start).images
    [same] = pipe.img2img(embeds, **start).images
    assert np.array_equal(pixels(same), pixels(words))


def test_S18_a_generator_is_its_seed(pipe: ZImagePipeline, tmp_path: Path) -> None:
    def made(generator: torch.Generator | int | None) -> np.ndarray:
        options = {"width": 48, "height": 32, "num_inference_steps": 1}
        return pixels(pipe("Homer Simpson", generator=generator, **options).images[0])

    assert np.array_equal(made(torch.Generator().manual_seed(42)), made(42))
    assert np.array_equal(made(None), made(0))
    assert not np.array_equal(made(42), made(43))


def test_what_makes_no_sense_is_refused(pipe: ZImagePipeline) -> None:
    embeds = torch.zeros(4, 48)
    for call in (
        lambda: pipe(),
        lambda: pipe("x", prompt_embeds=embeds),
        lambda: pipe("x", width=48),
        lambda: pipe(prompt_embeds=[embeds, embeds]),
        lambda: pipe(prompt_embeds=embeds[0]),
        lambda: pipe(prompt_embeds=torch.zeros(4, 47), width=48, height=32),
        lambda: pipe.img2img(embeds),
        lambda: pipe.img2img(embeds, picture(48, 32), strength=1.5),
    ):
        with pytest.raises(RequestError):
            call()
    with pytest.raises(CheckpointError, match="must be a Z-Image"):
        ZImagePipeline(Engine.open(device="cpu"))
