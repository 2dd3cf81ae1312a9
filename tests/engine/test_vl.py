"""Qwen3-VL against transformers: hidden states of every layer, what runs and what not, and which rows are which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.engine.vl import region_tokens
from qengine.engine.vl.raw import END, IMAGE, START, TEXT_AFTER, TEXT_BEFORE
from qengine.errors import CheckpointError, RequestError
from vlpipelines import (
    EVERY,
    LAYERS,
    build_vl,
    chat,
    open_vl,
    picture,
    reference_states,
    shared,
    shared_vl,
)

TEXT = "Homer Simpson"
RAW = {"scale_to_text": False}


def image_tokens(*sizes: tuple[int, int]) -> int:
    return sum((width // 32) * (height // 32) for width, height in sizes)


CASES = [
    ([(96, 64)], TEXT, None),
    ([(64, 96), (128, 64)], TEXT, "be brief"),
    ([(70, 130)], None, None),
    ([], TEXT, None),
]


@pytest.mark.parametrize(("sizes", "text", "system"), CASES)
def test_V02_every_hidden_layer_equals_transformers(sizes: Any, text: str | None, system: str | None) -> None:
    images = [picture(*size) for size in sizes]
    raw = shared().raw(images, text, EVERY, system_prompt=system)
    expected = reference_states(shared_vl(), chat(len(images), text, system), images)
    assert len(expected) == LAYERS + 1
    for layer in EVERY:
        torch.testing.assert_close(raw.hidden[layer], expected[LAYERS + 1 + layer], rtol=0, atol=1e-5)
    assert (expected[-1] - expected[-2]).abs().max() > 0.1


@pytest.mark.parametrize("layer", [0, 5, -LAYERS - 1, True, 1.5])
def test_V02_a_hidden_layer_outside_the_model_is_an_error(layer: Any) -> None:
    with pytest.raises(RequestError, match=f"hidden_layer must be -1 to -{LAYERS}"):
        shared().extract(picture(64, 64), hidden_layer=layer)


@pytest.mark.parametrize("selection", ["all", "image", "image_no_markers", "text"])
def test_V04_V05_V06_V07_selections_keep_their_rows(selection: Any) -> None:
    sizes = [(96, 64), (64, 64)]
    images = [picture(*size) for size in sizes]
    raw = shared().raw(images, TEXT, (-2,))
    n, total = image_tokens(*sizes), len(raw.input_ids)
    ids = raw.input_ids
    start, end, pad = (shared().encoder._chat.ids[k] for k in (0, 2, 1))
    expected = {
        "all": torch.ones(total, dtype=torch.bool),
        "image": (ids == start) | (ids == pad) | (ids == end),
        "image_no_markers": ids == pad,
        "text": ~((ids == start) | (ids == pad) | (ids == end)),
    }[selection]
    count = {"all": total, "image": n + 4, "image_no_markers": n, "text": total - n - 4}[selection]
    found = shared().extract(images, TEXT, hidden_layer=-2, token_selection=selection, **RAW)
    assert found.num_tokens == count and found.token_selection == selection
    assert torch.equal(found.embeddings, raw.hidden[-2][expected])


def test_V04_V06_the_older_switches_name_the_same_selections() -> None:
    image, text = picture(96, 64), TEXT
    for switch, word in (("image_tokens_only", "image"), ("text_tokens_only", "text")):
        one = shared().extract(image, text, hidden_layer=-2, **{switch: True}, **RAW)
        assert one.token_selection == word
        assert torch.equal(
            one.embeddings, shared().extract(image, text, hidden_layer=-2, token_selection=word, **RAW).embeddings
        )


@pytest.mark.parametrize(
    "given",
    [
        {"image_tokens_only": True, "text_tokens_only": True},
        {"image_tokens_only": True, "token_selection": "text"},
        {"token_selection": "words"},
    ],
)
def test_V06_two_selections_or_an_unknown_one_are_an_error(given: Any) -> None:
    with pytest.raises(RequestError, match="token.selection must be"):
        shared().extract(picture(64, 64), hidden_layer=-2, **given)


def test_V07_S07_all_tokens_are_the_default_and_the_picture_changes_them() -> None:
    first, second = (shared().extract(picture(96, 64, seed), TEXT, hidden_layer=-2) for seed in (0, 1))
    assert first.token_selection == "all" and first.num_tokens == len(first.input_token_ids)
    assert first.input_token_ids == second.input_token_ids
    assert not torch.equal(first.embeddings, second.embeddings)


def test_token_counts_follow_from_the_sizes_and_the_tokenizer() -> None:
    tokenizer = shared().encoder._chat.tokenizer
    words = len(tokenizer(chat(0, TEXT))["input_ids"])
    for size in ((96, 64), (256, 160), (64, 64)):
        raw = shared().raw(picture(*size), TEXT, (-LAYERS,))
        assert len(raw.input_ids) == words + image_tokens(size) + 2
        assert raw.grid_thw.tolist() == [[1, size[1] // 16, size[0] // 16]]
        assert tokenizer(raw.prompt)["input_ids"] == raw.input_ids.tolist()


def test_segments_name_every_row_and_its_picture() -> None:
    raw = shared().raw([picture(64, 64), picture(96, 64)], TEXT, (-LAYERS,))
    before = [TEXT_BEFORE] * 3
    spans = [START, *[IMAGE] * 4, END, START, *[IMAGE] * 6, END]
    after = [TEXT_AFTER] * (len(raw.input_ids) - len(before) - len(spans))
    assert raw.kinds.tolist() == [*before, *spans, *after]
    assert raw.images.tolist() == [0] * 9 + [1] * 8 + [0] * len(after)
    assert raw.segments.dtype == torch.uint8 and raw.input_ids.dtype == torch.int32


def test_V08_a_description_follows_the_picture_and_changes_no_image_row() -> None:
    image = picture(96, 64)
    without, short, long = (
        shared().raw(image, text, EVERY) for text in (None, "Homer", "Homer Simpson eating spaghetti")
    )
    assert without.prompt == chat(1, None).replace("<|image_pad|>", "<|image_pad|>" * 6)
    tail = long.prompt.split("<|vision_end|>")[1]
    assert tail.startswith("Homer Simpson eating spaghetti<|im_end|>")
    for layer in EVERY:
        rows = [raw.hidden[layer][:11] for raw in (without, short, long)]
        for other in rows[1:]:
            torch.testing.assert_close(rows[0], other, rtol=0, atol=2e-6)
    assert without.kinds[:11].tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3]


def test_causality_rows_before_the_picture_do_not_know_it_and_rows_after_it_do() -> None:
    first, second = (shared().raw(picture(96, 64, seed), TEXT, EVERY, system_prompt="be brief") for seed in (0, 1))
    other = shared().raw(picture(96, 64), TEXT, EVERY, system_prompt="be Simpson")
    start = int((first.kinds == START).nonzero())
    after = first.kinds == TEXT_AFTER
    for layer in EVERY:
        ours, theirs, prompted = (raw.hidden[layer] for raw in (first, second, other))
        assert torch.equal(ours[: start + 1], theirs[: start + 1])
        assert (ours[start + 1 :] - theirs[start + 1 :]).abs().amax(dim=1).min() > 0
        if layer > -LAYERS:
            assert (ours[first.kinds == IMAGE] - prompted[first.kinds == IMAGE]).abs().max() > 1e-3
            assert (ours[after] - prompted[after]).abs().max() > 1e-3


def test_V09_a_system_prompt_stands_first() -> None:
    raw = shared().raw(picture(64, 64), TEXT, (-LAYERS,), system_prompt="be brief")
    assert raw.prompt.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert shared().raw(picture(64, 64), TEXT, (-LAYERS,)).prompt.startswith("<|im_start|>user\n<|vision_start|>")


def test_V10_the_variants_end_as_their_templates_do_and_an_empty_think_block_is_four_tokens() -> None:
    ends = {"instruct": "<|im_start|>assistant\n", "thinking": "<|im_start|>assistant\n<think>\n"}
    for variant, end in ends.items():
        assert shared(variant).variant == variant
        assert shared(variant).raw([], TEXT, (-LAYERS,)).prompt.endswith("<|im_end|>\n" + end)
        closed = shared(variant).raw([], TEXT, (-LAYERS,), think_block=True)
        assert closed.prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    plain, closed = (shared().raw([], TEXT, (-LAYERS,), think_block=on) for on in (False, True))
    assert len(closed.input_ids) == len(plain.input_ids) + 4


def test_V31_layers_come_out_of_one_pass() -> None:
    extractor = open_vl()
    raw = extractor.raw(picture(96, 64), TEXT, (-2, -5, -3))
    assert extractor.counters.layer_visits == LAYERS - 1 and extractor.counters.vision_runs == 1
    for layer in (-2, -5, -3):
        alone = shared().raw(picture(96, 64), TEXT, (layer,)).hidden[layer]
        assert torch.equal(raw.hidden[layer], alone)
    found = shared().extract(picture(96, 64), TEXT, hidden_layer={-2: 0.7, -5: 0.3}, **RAW)
    torch.testing.assert_close(found.embeddings, 0.7 * raw.hidden[-2] + 0.3 * raw.hidden[-5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["attention", "remove"])
def test_V32_a_masked_tile_is_felt_by_no_other_row(mode: Any) -> None:
    image = picture(96, 64)
    painted = image.copy()
    painted.paste((255, 0, 0), (32, 0, 64, 32))
    free = [shared().raw(each, TEXT, EVERY) for each in (image, painted)]
    masked = [shared().raw(each, TEXT, EVERY, mask_tokens=[1], mask_mode=mode) for each in (image, painted)]
    count = len(free[0].input_ids)
    assert len(masked[0].input_ids) == (count if mode == "attention" else count - 1)
    others = torch.ones(len(masked[0].input_ids), dtype=torch.bool)
    if mode == "attention":
        others[5] = False
    for layer in EVERY[1:]:
        assert (free[0].hidden[layer] - free[1].hidden[layer])[6:].abs().max() > 1e-3
        assert torch.equal(masked[0].hidden[layer][others], masked[1].hidden[layer][others])
        assert (masked[0].hidden[layer][-1] - free[0].hidden[layer][-1]).abs().max() > 1e-4
    if mode == "attention":
        assert not torch.equal(masked[0].hidden[-2][5], masked[1].hidden[-2][5])


def test_V32_a_masked_token_and_a_removed_one_leave_the_same_other_rows() -> None:
    kept, gone = (
        shared().raw([picture(96, 64), picture(64, 64)], TEXT, EVERY, mask_tokens=[0, 4, 7], mask_mode=mode)
        for mode in ("attention", "remove")
    )
    rows = torch.ones(len(kept.input_ids), dtype=torch.bool)
    rows[(kept.kinds == IMAGE).nonzero().flatten()[[0, 4, 7]]] = False
    assert torch.equal(kept.segments[rows], gone.segments)
    for layer in EVERY:
        torch.testing.assert_close(kept.hidden[layer][rows], gone.hidden[layer], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [[6], [-1], range(6)])
def test_V32_masking_what_is_not_there_or_everything_is_an_error(tokens: Any) -> None:
    with pytest.raises(RequestError, match="mask_tokens must be some of 6"):
        shared().raw(picture(96, 64), TEXT, (-2,), mask_tokens=list(tokens))


def test_V32_a_region_names_its_tiles() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 4, 4]], dtype=torch.int32)
    assert region_tokens(grid, (0, 0, 1, 1)) == list(range(6))
    assert region_tokens(grid, (0.34, 0, 0.6, 0.5)) == [1]
    assert region_tokens(grid, (0, 0.5, 0.5, 1), picture=1) == [8]
    for box, number in (((0.5, 0, 0.5, 1), 0), ((0, 0, 2, 1), 0), ((0, 0, 1, 1), 2)):
        with pytest.raises(RequestError, match="region must be"):
            region_tokens(grid, box, picture=number)


@pytest.mark.parametrize("text", ["see <|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_a_text_that_holds_a_vision_token_is_an_error(text: str) -> None:
    with pytest.raises(RequestError, match="text must not hold"):
        shared().raw(picture(64, 64), text, (-2,))
    with pytest.raises(RequestError, match="system prompt must not hold"):
        shared().raw(picture(64, 64), None, (-2,), system_prompt=text)


def test_nothing_to_read_and_too_many_pictures_are_errors() -> None:
    with pytest.raises(RequestError, match="picture or a text"):
        shared().raw([], None, (-2,))
    with pytest.raises(RequestError, match="at most 32, got 33"):
        shared().raw([picture(32, 32)] * 33, None, (-2,))
    with pytest.raises(RequestError, match="layers must be at least one"):
        shared().raw(picture(32, 32), None, ())
    with pytest.raises(RequestError, match="image tokens to keep"):
        shared().extract([], TEXT, hidden_layer=-2, token_selection="image")


def test_a_template_that_does_not_place_the_pictures_is_an_error(tmp_path: Path) -> None:
    folder = build_vl(tmp_path / "bare")
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].role }}"}')
    with pytest.raises(CheckpointError, match="must place 1 pictures, got 0"):
        open_vl(folder).raw(picture(64, 64), TEXT, (-2,))
    (folder / "chat_template.json").write_text('{"chat_template": "{% broken"}')
    with pytest.raises(CheckpointError, match="chat template of .* must be usable"):
        open_vl(folder).raw(picture(64, 64), TEXT, (-2,))
