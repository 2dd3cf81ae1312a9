"""The prompt encoder against diffusers: tokens, embeddings, and what is neither loaded nor computed twice."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import build_pipeline, reference_pipeline, shared_pipeline
from qengine.engine.encoder import PromptEncoder
from qengine.engine.encoder.templates import TEMPLATES
from qengine.loaders.source import open_model
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
TEMPLATE_OF = {"qwen-image": "text", "edit": "edit", "edit-2509": "edit-plus", "edit-2511": "edit-plus"}
SIZES = ((140, 100), (75, 231), (57, 64))
PROMPT = "make it a cat at night"


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture with noise on it; the size is the seed."""
    generator = np.random.default_rng(width * 1000 + height)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((ramp + generator.integers(0, 56, (height, width, 3))).astype(np.uint8))


def pictures(count: int) -> list[Image.Image]:
    return [picture(*size) for size in SIZES[:count]]


def open_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> PromptEncoder:
    return PromptEncoder(open_model(folder), CPU, dtype)


@functools.cache
def encoder_of(kind: str) -> PromptEncoder:
    return open_encoder(shared_pipeline(kind))


@functools.cache
def reference_of(kind: str, mrope: bool = True) -> Any:
    return reference_pipeline(shared_pipeline(kind), mrope=mrope)


def reference_embeds(kind: str, prompt: str, images: list[Image.Image], mrope: bool = True) -> torch.Tensor:
    pipeline = reference_of(kind, mrope)
    given = {"edit": {"image": images[0] if images else None}, "qwen-image": {}}.get(kind, {"image": images})
    with torch.no_grad():
        return pipeline.encode_prompt(prompt, **given)[0][0]


CASES = [("qwen-image", 0), ("edit", 1), ("edit-2509", 2), ("edit-2511", 1), ("edit-2511", 2), ("edit-2511", 3)]


@pytest.mark.parametrize(("kind", "count"), CASES)
def test_E03_prompt_embeddings_equal_diffusers_for_every_template_and_number_of_pictures(kind: str, count: int) -> None:
    images = pictures(count)
    for prompt in (PROMPT, " ", "", "ünïcode 猫 {braces} <|im_end|> 12345"):
        [ours] = encoder_of(kind).encode([prompt], images, TEMPLATE_OF[kind])
        reference = reference_embeds(kind, prompt, images)
        assert ours.shape == reference.shape
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "count"), CASES)
def test_E03_token_ids_equal_those_of_the_reference_processor(kind: str, count: int) -> None:
    images = pictures(count)
    pipeline = reference_of(kind)
    labels = "".join(f"Picture {k + 1}: <|vision_start|><|image_pad|><|vision_end|>" for k in range(count))
    text = pipeline.prompt_template_encode.format(PROMPT if kind in ("qwen-image", "edit") else labels + PROMPT)
    processor = pipeline.tokenizer if kind == "qwen-image" else functools.partial(pipeline.processor, images=images)
    expected = processor(text=[text], return_tensors="pt")["input_ids"][0]
    assert torch.equal(encoder_of(kind).tokens(PROMPT, images, TEMPLATE_OF[kind]), expected)


@pytest.mark.parametrize("kind", TEMPLATE_OF)
def test_templates_drop_as_many_tokens_as_the_reference(kind: str) -> None:
    assert TEMPLATES[TEMPLATE_OF[kind]].drop_tokens == reference_of(kind).prompt_template_encode_start_idx


def test_leaving_out_the_3d_positions_changes_the_embeddings() -> None:
    images = pictures(2)
    [ours] = encoder_of("edit-2511").encode([PROMPT], images, "edit-plus")
    without = reference_embeds("edit-2511", PROMPT, images, mrope=False)
    assert (ours - without).abs().max() > 0.05


@pytest.mark.parametrize("kind", TEMPLATE_OF)
def test_prompt_and_negative_together_equal_each_alone_and_share_their_beginning(kind: str) -> None:
    images, template = pictures({"qwen-image": 0, "edit": 1}.get(kind, 2)), TEMPLATE_OF[kind]
    prompts = [PROMPT, " ", "a very different and longer negative prompt", PROMPT]
    encoder = open_encoder(shared_pipeline(kind))
    together = encoder.encode(prompts, images, template)
    rows = [encoder.tokens(prompt, images, template) for prompt in prompts[:3]]
    same = torch.stack([row[: min(map(len, rows))] == rows[0][: min(map(len, rows))] for row in rows]).all(dim=0)
    common = int((~same).int().argmax())
    assert common >= TEMPLATES[template].drop_tokens
    assert encoder.counters.vision_runs == (1 if images else 0)
    assert encoder.counters.layer_visits == 3
    assert encoder.counters.embedded_rows == common + sum(len(row) - common for row in rows)
    for prompt, embeds in zip(prompts, together, strict=True):
        [alone] = encoder_of(kind).encode([prompt], images, template)
        torch.testing.assert_close(embeds, alone, rtol=0, atol=1e-5)


def test_a_prompt_that_begins_another_chat_whole_keeps_a_row_of_its_own() -> None:
    short = "a"
    longer = "a<|im_end|>\n<|im_start|>assistant\n and more"
    both = encoder_of("qwen-image").encode([short, longer], [], "text")
    for prompt, embeds in zip((short, longer), both, strict=True):
        torch.testing.assert_close(embeds, reference_embeds("qwen-image", prompt, []), rtol=0, atol=1e-5)


def _used_tensors() -> list[str]:
    encoder = open_model(shared_pipeline("edit-2511")).text_encoder.checkpoint
    return [name for name in encoder.tensors if name != "lm_head.weight"]


@pytest.mark.parametrize("group", ["visual.", "language_model."])
def test_every_tensor_is_felt_in_the_embeddings(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(shared_pipeline("edit-2511"))
    checkpoint = source.text_encoder.checkpoint
    encoder = PromptEncoder(source, CPU, torch.float32)
    images = pictures(1)
    [base] = encoder.encode([PROMPT], images, "edit-plus")
    read_into, rows, zeroed = checkpoint.read_into, checkpoint.rows, ""

    def read_zeroed(items: Any) -> None:
        read_into(items)
        for name, tensor in items:
            if name == zeroed:
                tensor.zero_()

    def rows_zeroed(name: str, indices: torch.Tensor) -> torch.Tensor:
        return rows(name, indices) * (name != zeroed)

    monkeypatch.setattr(checkpoint, "read_into", read_zeroed)
    monkeypatch.setattr(checkpoint, "rows", rows_zeroed)
    names = [name for name in _used_tensors() if name.startswith(group)]
    assert len(names) > 20
    for zeroed in names:
        encoder.release()
        [changed] = encoder.encode([PROMPT], images, "edit-plus")
        assert (changed - base).abs().max() > 1e-3, zeroed


def test_neither_the_language_head_nor_the_embedding_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(shared_pipeline("edit-2511"))
    checkpoint = source.text_encoder.checkpoint
    read_into, seen = checkpoint.read_into, set()

    def record(items: Any) -> None:
        seen.update(name for name, _ in items)
        read_into(items)

    monkeypatch.setattr(checkpoint, "read_into", record)
    encoder = PromptEncoder(source, CPU, torch.float32)
    assert not seen
    encoder.encode([PROMPT], pictures(1), "edit-plus")
    assert seen == set(checkpoint.tensors) - {"lm_head.weight", "language_model.embed_tokens.weight"}


def test_a_prompt_without_pictures_never_loads_the_vision_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = open_encoder(shared_pipeline("qwen-image"))
    monkeypatch.setattr("qengine.engine.encoder.prompt.VisionTower", None)
    encoder.encode([PROMPT], [], "text")
    assert encoder.counters.vision_runs == 0


def test_names_of_transformers_5_in_memory_are_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(shared_pipeline("edit-2511"), folder)
    file = next((folder / "text_encoder").glob("*.safetensors"))
    renamed = {}
    for name, tensor in load_file(file).items():
        inner = name.removeprefix("model.")
        inner = inner if inner.startswith(("language_model.", "visual.", "lm_head.")) else f"language_model.{inner}"
        renamed[inner if inner.startswith("lm_head") else f"model.{inner}"] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    [ours] = open_encoder(folder).encode([PROMPT], pictures(1), "edit-plus")
    [other] = encoder_of("edit-2511").encode([PROMPT], pictures(1), "edit-plus")
    assert torch.equal(ours, other)


def test_a_tied_encoder_has_no_language_head_and_equals_diffusers(tmp_path: Path) -> None:
    folder = build_pipeline("qwen-image", tmp_path / "tied", tied=True, seed=5)
    assert "lm_head.weight" not in open_model(folder).text_encoder.checkpoint.tensors
    [ours] = open_encoder(folder).encode([PROMPT], [], "text")
    with torch.no_grad():
        expected = reference_pipeline(folder).encode_prompt(PROMPT)[0][0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_bfloat16_differs_from_float32_by_no_more_than_twice_the_reference_in_bfloat16() -> None:
    images = pictures(2)
    [exact] = encoder_of("edit-2511").encode([PROMPT], images, "edit-plus")
    [ours] = open_encoder(shared_pipeline("edit-2511"), torch.bfloat16).encode([PROMPT], images, "edit-plus")
    pipeline = reference_pipeline(shared_pipeline("edit-2511"))
    pipeline.text_encoder.to(torch.bfloat16)
    with torch.no_grad():
        reference = pipeline.encode_prompt(PROMPT, images)[0][0]
    assert ours.dtype == torch.bfloat16
    error, allowed = ((value.float() - exact).square().mean().sqrt() for value in (ours, reference))
    assert 0 < error <= 2 * allowed


def test_release_frees_the_weights_and_the_next_prompt_reads_them_again() -> None:
    encoder = open_encoder(shared_pipeline("edit"))
    [first] = encoder.encode([PROMPT], pictures(1), "edit")
    encoder.release()
    assert encoder._language is None and encoder._vision is None
    [second] = encoder.encode([PROMPT], pictures(1), "edit")
    assert torch.equal(first, second)


def test_a_check_that_raises_stops_between_layers() -> None:
    encoder = open_encoder(shared_pipeline("qwen-image"))
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        encoder.encode([PROMPT], [], "text", check=check)
    assert encoder.counters.layer_visits == 2


def test_a_single_pixel_is_taken_as_the_reference_takes_it() -> None:
    images = [Image.new("RGB", (1, 1), (200, 30, 90))]
    [ours] = encoder_of("edit-2511").encode([PROMPT], images, "edit-plus")
    torch.testing.assert_close(ours, reference_embeds("edit-2511", PROMPT, images), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_encoder_on_cuda_agrees_with_the_cpu() -> None:
    images = pictures(2)
    encoder = PromptEncoder(open_model(shared_pipeline("edit-2511")), torch.device("cuda"), torch.float32)
    for ours, expected in zip(
        encoder.encode([PROMPT, " "], images, "edit-plus"),
        encoder_of("edit-2511").encode([PROMPT, " "], images, "edit-plus"),
        strict=True,
    ):
        torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=1e-4)
