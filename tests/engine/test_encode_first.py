"""Encoding many requests before running them loads the text encoder once."""

from __future__ import annotations

from PIL import Image
from pipelines import shared_pipeline
from qengine import Choices, EditRequest, Engine


def test_E20_prompts_that_were_encoded_first_load_the_text_encoder_once(tmp_path, monkeypatch) -> None:
    picture = Image.new("RGB", (64, 64), (90, 120, 30))
    requests = [
        EditRequest(images=(picture,), prompt=prompt, size=(64, 64), num_inference_steps=1, true_cfg_scale=1.0)
        for prompt in ("one", "two", "three")
    ]
    choices = Choices(offload="sequential")
    with Engine.open(shared_pipeline("edit-2511"), device="cpu", cache_dir=tmp_path, choices=choices) as engine:
        for request in requests:
            assert not engine.encode(request).cached
        for request in requests:
            assert next(iter(engine.stream(request))).cached
            list(engine.stream(request))
        assert engine._components.log.count("load text_encoder") == 1
        assert engine._components.log.count("load transformer") == 3
