"""The Z-Image text encoder against diffusers: tokens, embeddings, and what is neither loaded nor computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.engine.mover import Placement
from qengine.engine.stack import Hold
from qengine.engine.zimage import ZImageEncoder
from qengine.errors import CheckpointError, RequestError
from qengine.loaders.component import Component
from zpipelines import open_zimage, reference_zimage, shared_zimage

CPU = torch.device("cpu")
PROMPTS = ("make it a cat at night", "", " ", "ünïcode 猫 {braces} <|im_end|> 12345", "grayscale " * 60)


def open_encoder(**options: Any) -> ZImageEncoder:
    return ZImageEncoder(open_zimage(shared_zimage()), CPU, torch.float32, **options)


def reference(prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return reference_zimage().encode_prompt(prompt, do_classifier_free_guidance=False)[0][0]


def test_prompt_embeddings_equal_diffusers_and_every_token_is_kept() -> None:
    encoder = open_encoder()
    for prompt in PROMPTS:
        [ours] = encoder.encode([prompt])
        expected = reference(prompt)
        assert ours.shape == expected.shape == (len(encoder.tokens(prompt)), 48)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_tokens_are_those_of_the_chat_template_with_thinking_on() -> None:
    tokenizer, encoder = reference_zimage().tokenizer, open_encoder()
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        expected = tokenizer.apply_chat_template(chat, enable_thinking=True, **options)
        assert encoder.tokens(prompt).tolist() == tokenizer(expected)["input_ids"]
        without = tokenizer.apply_chat_template(chat, enable_thinking=False, **options)
        assert without == expected + "<think>\n\n</think>\n\n"
    assert len(encoder.tokens("")) == 8


def test_prompt_and_negative_together_equal_each_alone_and_share_their_beginning() -> None:
    encoder, prompts = open_encoder(), [PROMPTS[0], "", PROMPTS[3], PROMPTS[0]]
    together = encoder.encode(prompts)
    rows = [encoder.tokens(prompt) for prompt in prompts[:3]]
    assert encoder.counters.layer_visits == 2
    assert encoder.counters.embedded_rows == sum(map(len, rows)) - 2 * 3
    for prompt, embeds in zip(prompts, together, strict=True):
        torch.testing.assert_close(embeds, reference(prompt), rtol=0, atol=1e-5)


def test_the_last_layer_the_final_norm_and_the_tables_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_zimage(shared_zimage())
    checkpoint, seen = source.text_encoder.checkpoint, set()
    read_into = checkpoint.read_into

    def record(items: Any) -> None:
        seen.update(name for name, _ in items)
        read_into(items)

    monkeypatch.setattr(checkpoint, "read_into", record)
    encoder = ZImageEncoder(source, CPU, torch.float32)
    assert not seen
    encoder.encode([PROMPTS[0]])
    unread = set(checkpoint.tensors) - seen
    last = {name for name in checkpoint.tensors if name.startswith("language_model.layers.2.")}
    assert unread == last | {"language_model.norm.weight", "language_model.embed_tokens.weight"}


def test_every_tensor_that_is_read_is_felt(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_zimage(shared_zimage())
    checkpoint = source.text_encoder.checkpoint
    read_into, rows, zeroed = checkpoint.read_into, checkpoint.rows, ""

    def into(items: Any) -> None:
        read_into(items)
        for name, tensor in items:
            if name == zeroed:
                tensor.zero_()

    monkeypatch.setattr(checkpoint, "read_into", into)
    monkeypatch.setattr(checkpoint, "rows", lambda name, indices: rows(name, indices) * (name != zeroed))
    encoder = ZImageEncoder(source, CPU, torch.float32)
    [base] = encoder.encode([PROMPTS[0]])
    unread = ("language_model.layers.2.", "language_model.norm.")
    names = [name for name in checkpoint.tensors if not name.startswith(unread)]
    assert len(names) == 2 * 11 + 1
    for zeroed in names:
        encoder.release()
        [changed] = encoder.encode([PROMPTS[0]])
        assert (changed - base).abs().max() > 1e-3, zeroed


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
def test_where_the_layers_lie_never_changes_a_bit(weight_format: str, tmp_path: Path) -> None:
    prompts = [PROMPTS[0], ""]
    resident = open_encoder(hold=Hold(weight_format), cache=tmp_path).encode(prompts)
    for placement in (Placement(2, (0, 1), slots=1), Placement(2, (1,), slots=2, host="disk")):
        streamed = open_encoder(hold=Hold(weight_format, placement), cache=tmp_path).encode(prompts)
        assert all(torch.equal(a, b) for a, b in zip(streamed, resident, strict=True))


def test_a_prompt_too_long_is_refused_and_never_cut() -> None:
    encoder = open_encoder(max_tokens=20)
    with pytest.raises(RequestError, match="at most 20 tokens with its template, got 70"):
        encoder.encode(["grayscale " * 60])
    assert encoder.counters.layer_visits == 0
    with pytest.raises(RequestError, match="at most 512 tokens"):
        open_encoder().encode(["grayscale " * 600])


def test_pictures_and_other_templates_are_refused() -> None:
    picture: Any = object()
    with pytest.raises(RequestError, match="pictures of the z-image template must be 0, got 1"):
        open_encoder().encode(["a"], [picture])
    with pytest.raises(RequestError, match="must be z-image, got 'edit'"):
        open_encoder().encode(["a"], [], "edit")


def test_an_encoder_of_another_kind_is_refused() -> None:
    source = open_zimage(shared_zimage())
    part = source.text_encoder
    other = Component(part.name, {**part.config, "model_type": "llama"}, part.checkpoint)
    encoder = ZImageEncoder(source, CPU, torch.float32)
    object.__setattr__(source, "text_encoder", other)
    with pytest.raises(CheckpointError, match="type qwen3, got 'llama'"):
        encoder.encode(["a"])


def test_the_key_follows_the_prompts_and_the_weight_format() -> None:
    def key(prompts: list[str], **options: Any) -> str:
        return open_encoder(**options).key(prompts, [], "z-image")

    same = key(["a", ""])
    assert same == key(["a", ""])
    assert len({same, key(["b", ""]), key(["a"]), key(["a", ""], hold=Hold("int8"))}) == 4
