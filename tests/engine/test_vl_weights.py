"""The weights of Qwen3-VL: which are read, where they lie, in which format, and that each of them is felt."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.engine.mover import Placement
from qengine.engine.stack import Hold
from qengine.engine.vl import UnloadedError, VLEmbeddingExtractor
from qengine.errors import QEngineError
from vlpipelines import (
    EVERY,
    HIDDEN,
    LAYERS,
    build_vl,
    chat,
    open_vl,
    picture,
    reference_model,
    reference_states,
    shared,
    shared_vl,
)

TEXT = "Homer Simpson"
RAW = {"scale_to_text": False}


def test_V03_layers_above_the_needed_one_are_neither_run_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = open_vl()
    checkpoint, read = extractor.source.component.checkpoint, set[str]()
    read_into = checkpoint.read_into

    def record(items: Any) -> None:
        read.update(name for name, _ in items)
        read_into(items)

    monkeypatch.setattr(checkpoint, "read_into", record)
    found = extractor.extract(picture(96, 64), TEXT, hidden_layer=-4, **RAW)
    assert extractor.counters.layer_visits == 3
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"0", "1", "2"}
    assert not {name for name in read if "embed_tokens" in name or "lm_head" in name}
    full = shared().raw(picture(96, 64), TEXT, EVERY)
    assert torch.equal(found.embeddings, full.hidden[-4])
    deeper = extractor.extract(picture(96, 64), TEXT, hidden_layer=-1, **RAW)
    assert extractor.counters.layer_visits == 3 + LAYERS
    torch.testing.assert_close(deeper.embeddings, full.hidden[-1], rtol=0, atol=0)


def test_V01_a_model_opens_without_reading_weights_and_says_what_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        extractor = VLEmbeddingExtractor.from_pretrained(shared_vl("thinking"))
    assert (extractor.hidden_size, extractor.layers, extractor.variant) == (HIDDEN, LAYERS, "thinking")
    assert extractor.source.component.checkpoint.bytes_read == 0 and not extractor.encoder.loaded
    assert caplog.messages == [f"hidden size of the Qwen3-VL model is {HIDDEN}; Z-Image takes 2560"]
    found = extractor.extract(picture(64, 64), TEXT, hidden_layer=-2, **RAW)
    assert found.embeddings.dtype == torch.bfloat16 and found.model_variant == "thinking"


def test_bfloat16_differs_from_float32_by_no_more_than_transformers_in_bfloat16() -> None:
    images = [picture(96, 64)]
    exact = reference_states(shared_vl(), chat(1, TEXT), images)
    ours = open_vl(dtype=torch.bfloat16).raw(images, TEXT, (-2,)).hidden[-2]
    reference_model(shared_vl()).to(torch.bfloat16)
    theirs = reference_states(shared_vl(), chat(1, TEXT), images)
    reference_model.cache_clear()
    error, allowed = (
        (value.float() - exact[LAYERS - 1]).square().mean().sqrt() for value in (ours, theirs[LAYERS - 1])
    )
    assert 0 < error <= 2 * allowed


def test_an_unloaded_extractor_holds_nothing_and_refuses() -> None:
    extractor = open_vl()
    extractor.extract(picture(64, 64), hidden_layer=-2)
    assert extractor.encoder.loaded and extractor.tape is not None
    extractor.unload()
    assert not extractor.encoder.loaded and extractor.tape is None
    with pytest.raises(RuntimeError, match="must be loaded") as caught:
        extractor.extract(picture(64, 64), hidden_layer=-2)
    assert isinstance(caught.value, UnloadedError) and isinstance(caught.value, QEngineError)


def test_released_weights_are_read_again_and_give_the_same_bits() -> None:
    extractor = open_vl(alone=True)
    first = extractor.raw(picture(64, 64), TEXT, (-2,)).hidden[-2]
    assert extractor.encoder._vision is None
    extractor.encoder.release()
    assert torch.equal(extractor.raw(picture(64, 64), TEXT, (-2,)).hidden[-2], first)


@pytest.mark.parametrize("host", ["arena", "disk", "mapped"])
def test_placement_of_the_layers_changes_no_bit(host: str, tmp_path: Path) -> None:
    hold = Hold(placement=Placement(LAYERS, (0, 2, 5), 2, host))
    extractor = open_vl(hold=hold, cache=tmp_path)
    raw = extractor.raw(picture(96, 64), TEXT, EVERY)
    early = extractor.raw(picture(96, 64), TEXT, (-3,))
    for layer in EVERY:
        assert torch.equal(raw.hidden[layer], shared().raw(picture(96, 64), TEXT, EVERY).hidden[layer])
    assert torch.equal(early.hidden[-3], raw.hidden[-3])


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_8_bit_layers_come_near_at_every_depth_from_one_packed_file(weight_format: str, tmp_path: Path) -> None:
    extractor = open_vl(weight_format=weight_format, cache=tmp_path)
    exact = shared().raw(picture(96, 64), TEXT, EVERY)
    for layer in (-4, -1):
        found = extractor.raw(picture(96, 64), TEXT, (layer,)).hidden[layer]
        error = (found - exact.hidden[layer]).square().mean() / exact.hidden[layer].square().mean()
        assert 0 < math.sqrt(error) < {"int8": 0.03, "fp8": 0.1}[weight_format]
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_every_tensor_is_felt_in_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = open_vl()
    checkpoint = extractor.source.component.checkpoint
    base = extractor.raw(picture(96, 64), TEXT, (-1,)).hidden[-1]
    read_into, rows, zeroed = checkpoint.read_into, checkpoint.rows, ""

    def read_zeroed(items: Any) -> None:
        read_into(items)
        for name, tensor in items:
            if name == zeroed:
                tensor.zero_()

    monkeypatch.setattr(checkpoint, "read_into", read_zeroed)
    monkeypatch.setattr(checkpoint, "rows", lambda name, indices: rows(name, indices) * (name != zeroed))
    names = [name for name in checkpoint.tensors if name != "lm_head.weight"]
    assert len(names) > 100
    for zeroed in names:
        if zeroed.startswith("visual."):
            extractor.encoder.release_vision()
        else:
            extractor.encoder._release_language()
        changed = extractor.raw(picture(96, 64), TEXT, (-1,)).hidden[-1]
        assert (changed - base).abs().max() > 1e-3, zeroed


def test_a_check_that_raises_stops_between_layers() -> None:
    extractor, calls = open_vl(), []

    def check() -> None:
        calls.append(None)
        if len(calls) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        extractor.raw(picture(64, 64), TEXT, (-1,), check=check)
    assert extractor.counters.layer_visits == 2


def test_what_was_looked_at_is_recorded_without_paths_or_times(tmp_path: Path) -> None:
    image, file = picture(70, 130), tmp_path / "a.png"
    image.save(file)
    raw = shared().raw([file, image], TEXT, (-LAYERS,), think_block=True, mask_tokens=[3])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert [(seen.width, seen.height) for seen in raw.pictures] == [(70, 130)] * 2
    assert raw.pictures[0].sha256 == digest != raw.pictures[1].sha256
    assert (raw.think_block, raw.masked) == (True, (3,))
    words = json.dumps(dict(shared().encoder.identity))
    assert str(shared_vl()) not in words and "fingerprint" not in words
    assert open_vl().encoder.identity == shared().encoder.identity
    others = [open_vl(weight_format="int8"), open_vl(dtype=torch.bfloat16), open_vl(shared_vl("thinking"))]
    for other, changed in zip(others, ({"weight_format"}, {"dtype"}, {"variant", "template"}), strict=True):
        pairs = (dict(shared().encoder.identity), dict(other.encoder.identity))
        assert {key for key in pairs[0] if pairs[0][key] != pairs[1][key]} == changed


def test_the_config_as_the_hub_writes_it_is_the_same_model(tmp_path: Path) -> None:
    folder = shutil.copytree(shared_vl(), tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rope.pop("rope_theta")
    config["text_config"]["rope_scaling"] = {**rope, "mrope_interleaved": True}
    config["vision_config"].pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    ours, theirs = (each.raw(picture(96, 64), TEXT, (-2,)).hidden[-2] for each in (open_vl(folder), shared()))
    assert torch.equal(ours, theirs)


def test_attention_with_biases_equals_transformers(tmp_path: Path) -> None:
    folder = build_vl(tmp_path / "biased", attention_bias=True, seed=3)
    raw = open_vl(folder).raw(picture(96, 64), TEXT, (-2,))
    expected = reference_states(folder, chat(1, TEXT), [picture(96, 64)])
    torch.testing.assert_close(raw.hidden[-2], expected[LAYERS - 1], rtol=0, atol=1e-5)
