"""Parts that were encoded beforehand stand in for the encoders of a run, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine import Decoded, EditRequest, Encoded, Engine, GenerateRequest
from qengine.engine.defaults import DEFAULTS
from qengine.engine.given import Given
from qengine.engine.keep.options import Keep
from qengine.engine.reference.options import Reference
from qengine.engine.seen import pixels_of
from qengine.errors import RequestError
from zpipelines import shared_zimage

SIZE = (80, 48)
EDIT = "qwen-image-edit-2511"


def picture(width: int = 80, height: int = 48, seed: int = 4) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def small(**options: Any) -> GenerateRequest:
    return GenerateRequest(**({"prompt": "a cat", "num_inference_steps": 2, "size": SIZE} | options))


def last(engine: Engine, request: GenerateRequest) -> Decoded:
    *_, decoded = engine.stream(request)
    assert isinstance(decoded, Decoded)
    return decoded


def encoded(engine: Engine, request: GenerateRequest) -> Encoded:
    """What :meth:`Engine.encode` gives, as it would come from a file."""
    found = engine.encode(request)
    made = found.conditioning
    negative = None if made.negative_embeds is None else made.negative_embeds.clone()
    return replace(
        found, conditioning=replace(made, prompt_embeds=made.prompt_embeds.clone(), negative_embeds=negative)
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.mark.parametrize("options", [{}, {"init_image": picture(), "strength": 0.5}], ids=["text", "picture"])
def test_S14_given_embeddings_equal_the_prompt_to_the_bit(
    engine: Engine, options: dict[str, Any], tmp_path: Path
) -> None:
    request = small(guidance_scale=2.0, negative_prompt="gray", **options)
    known = encoded(engine, request).conditioning
    given = Given(known.prompt_embeds, known.negative_embeds)
    with Engine.open(shared_zimage(), device="cpu", cache_dir=tmp_path) as elsewhere:
        made = last(elsewhere, replace(request, given=given))
        assert "load text_encoder" not in elsewhere._components.log
    expected = last(engine, request)
    assert torch.equal(made.latents, expected.latents) and made.image.tobytes() == expected.image.tobytes()
    assert made.metadata["request"]["given"] == given.key and "given" not in expected.metadata["request"]


def test_S14_a_negative_prompt_that_is_not_given_is_encoded(engine: Engine) -> None:
    request = small(guidance_scale=2.0, negative_prompt="gray")
    known = encoded(engine, request).conditioning
    made = last(engine, replace(request, given=Given(known.prompt_embeds)))
    torch.testing.assert_close(made.latents, last(engine, request).latents, atol=1e-5, rtol=1e-5)


def test_given_latents_of_the_picture_equal_the_picture_to_the_bit(engine: Engine) -> None:
    request = small(init_image=picture(), strength=0.5, num_inference_steps=4)
    latents = last(engine, replace(request, strength=0.0)).latents
    alone = replace(request, init_image=None, size=None, given=Given(init=latents, size=SIZE))
    expected = last(engine, request)
    for asked in (replace(request, given=Given(init=latents, size=SIZE)), alone):
        assert torch.equal(last(engine, asked).latents, expected.latents)


def test_what_is_given_is_part_of_the_runs_identity(engine: Engine) -> None:
    first, second = (torch.randn(5, 48, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    states = []
    for embeds in (first, second):
        events = list(engine.stream(small(given=Given(embeds))))
        assert isinstance(events[0], Encoded) and events[0].conditioning.key == Given(embeds).key
        states.append(events[1].state)  # pyright: ignore[reportAttributeAccessIssue]
    assert states[0].key != states[1].key


def test_S24_wrong_widths_are_refused_with_both_numbers(engine: Engine) -> None:
    for given, words in (
        (Given(torch.zeros(4, 2560)), "prompt_embeds must be 48 wide as this transformer reads them, got 2560"),
        (Given(torch.zeros(4, 48), torch.zeros(4, 47)), "negative_embeds must be 48 wide .* got 47"),
        (Given(torch.zeros(225, 48)), "prompt_embeds must be at most 224 rows, got 225"),
        (
            Given(init=torch.zeros(1, 4, 1, 6, 10), size=SIZE),
            r"init must be \[1, 16, 1, h, w\] .* got \[1, 4, 1, 6, 10",
        ),
        (Given(init=torch.zeros(1, 16, 1, 6, 8), size=SIZE), "init must be 6 x 10 latent cells for this size"),
    ):
        with pytest.raises(RequestError, match=words):
            engine.plan(small(given=given))
    with pytest.raises(RequestError, match="size must be that of the given latents"):
        small(size=(64, 64), given=Given(init=torch.zeros(1, 16, 1, 6, 10), size=SIZE))
    with pytest.raises(RequestError, match="given must be encoded parts"):
        small(given={"prompt_embeds": torch.zeros(4, 48)})


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    area = 64 * 48
    areas = {"area_pixels": area, "condition_area_pixels": area, "reference_area_pixels": area}
    monkeypatch.setitem(DEFAULTS, EDIT, replace(DEFAULTS[EDIT], **areas))
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path) as opened:
        yield opened


def test_an_edit_from_given_latents_equals_that_from_the_pictures(editor: Engine) -> None:
    request = EditRequest(
        images=(picture(), picture(48, 64, 5)), prompt="warm", size=(64, 48), num_inference_steps=2, seed=3
    )
    known = encoded(editor, request).conditioning
    job = editor._resolve(request)
    editor._components.plan = editor.plan(request)
    vae = editor._components.vae
    references = tuple(
        vae.encode(pixels_of(each.image, geometry)) for each, geometry in zip(job.pictures, job.references, strict=True)
    )
    given = Given(known.prompt_embeds, known.negative_embeds, references, size=(64, 48))
    expected = last(editor, request)
    asked = GenerateRequest(prompt="warm", num_inference_steps=2, seed=3, given=given)
    assert torch.equal(last(editor, asked).latents, expected.latents)
    assert torch.equal(last(editor, replace(request, given=given)).latents, expected.latents)
    weaker = EditRequest(**_fields(asked), images=(), reference=Reference(strength=0.5))
    beside = replace(request, reference=Reference(strength=0.5))
    assert torch.equal(last(editor, weaker).latents, last(editor, beside).latents)
    assert last(editor, asked).metadata["kind"] == "edit"
    _check_refusals(editor, asked, given)


def _check_refusals(editor: Engine, asked: GenerateRequest, given: Given) -> None:
    with pytest.raises(RequestError, match="images must be there where they are kept, masked or resized"):
        EditRequest(**_fields(asked), images=(), keep=Keep(mask=picture()))
    with pytest.raises(RequestError, match="kept, masked or resized"):
        EditRequest(**_fields(asked), images=(), resize_control="image")
    with pytest.raises(RequestError, match="init must be given where a run starts from the first picture"):
        editor.plan(EditRequest(**_fields(asked), images=(), denoise=0.5))
    with pytest.raises(RequestError, match="prompt_embeds must be given where pictures are there as latents alone"):
        editor.plan(replace(asked, given=replace(given, prompt_embeds=None, negative_embeds=None)))
    with pytest.raises(RequestError, match="negative_embeds must be given"):
        editor.plan(replace(asked, given=replace(given, negative_embeds=None)))
    with pytest.raises(RequestError, match="must be a picture to edit|must get a picture to edit"):
        editor.plan(replace(asked, given=replace(given, references=())))


def _fields(request: GenerateRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("prompt", "num_inference_steps", "seed", "given")}
