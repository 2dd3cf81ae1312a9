"""What the prompt encoder refuses, and with which words."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import reference_pipeline, shared_pipeline
from qengine.engine.encoder import PromptEncoder
from qengine.engine.encoder.templates import TEMPLATES
from qengine.errors import CheckpointError, InputError, RequestError
from qengine.loaders.source import open_model

PROMPT = "make it a cat at night"


def open_encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder(open_model(folder), torch.device("cpu"), torch.float32)


@functools.cache
def encoder_of(kind: str) -> PromptEncoder:
    return open_encoder(shared_pipeline(kind))


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (100, 140), (200, 100, 40 * k)) for k in range(count)]


@pytest.mark.parametrize(("kind", "template"), [("qwen-image", "text"), ("edit-2511", "edit-plus")])
def test_a_prompt_of_20000_characters_is_refused_with_its_length(kind: str, template: str) -> None:
    count = 0 if template == "text" else 1
    with pytest.raises(RequestError, match=r"at most 1024 tokens .* got \d{4,}"):
        encoder_of(kind).encode(["cat, " * 4000], pictures(count), template)


def test_the_longest_prompt_is_as_long_as_diffusers_keeps_and_one_token_more_is_refused() -> None:
    tail = len(encoder_of("qwen-image").tokens("", [], "text")) - TEMPLATES["text"].drop_tokens
    prompt = "1" * (1024 - tail)
    [ours] = encoder_of("qwen-image").encode([prompt], [], "text")
    with torch.no_grad():
        reference = reference_pipeline(shared_pipeline("qwen-image")).encode_prompt(prompt)[0][0]
    assert len(ours) == len(reference) == 1024
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    with pytest.raises(RequestError, match="got 1025"):
        encoder_of("qwen-image").encode([prompt + "1"], [], "text")


def test_the_wrong_number_of_pictures_and_unknown_templates_are_refused() -> None:
    for template, count in (("text", 1), ("edit", 0), ("edit", 2)):
        with pytest.raises(RequestError, match=f"pictures of the {template} template"):
            encoder_of("edit").encode([PROMPT], pictures(count), template)
    with pytest.raises(RequestError, match="must be one of text, edit, edit-plus"):
        encoder_of("edit").encode([PROMPT], [], "edit_plus")


def test_a_placeholder_in_the_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="placeholder"):
        encoder_of("edit").encode(["a <|image_pad|> b"], pictures(1), "edit")


def test_a_picture_that_is_one_line_is_refused() -> None:
    with pytest.raises(InputError, match="got 1x5000"):
        encoder_of("edit").encode([PROMPT], [Image.new("RGB", (1, 5000))], "edit")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(shared_pipeline("edit"), folder)
    config = folder / "text_encoder" / "config.json"
    stored = json.loads(config.read_text())
    stored["image_token_id"] -= 1
    config.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="of the tokenizer must be token"):
        open_encoder(folder).encode([PROMPT], pictures(1), "edit")
