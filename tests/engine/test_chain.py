"""Stages and chains of edits, on an editor that adds 1 to every pixel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from qengine.engine.chain import THREE_STAGES, Stage, run_chain, run_stages
from qengine.engine.reference.options import Reference
from qengine.errors import RequestError


class Adder:
    """An editor whose pictures count the edits; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], str, dict[str, Any]]] = []

    def edit(self, images, prompt: str, **options: Any):
        seen = [image.getpixel((0, 0)) for image in images]
        self.asked.append((seen, prompt, options))
        return SimpleNamespace(image=Image.new("L", (2, 2), seen[0] + 1))


def black() -> Image.Image:
    return Image.new("L", (2, 2), 0)


def test_R13_each_stage_edits_the_picture_of_the_one_before_with_its_own_method_and_strength() -> None:
    editor: Any = Adder()
    links = list(run_stages(editor, black(), "a hat", THREE_STAGES, seed=7))
    assert [link.result.image.getpixel((0, 0)) for link in links] == [1, 2, 3]
    assert [seen for seen, _, _ in editor.asked] == [[0], [1], [2]]
    said = [(options["reference"].method, options["reference"].strength) for _, _, options in editor.asked]
    assert said == [("default", 0.4), ("inject", 0.8), ("cross_attn", 1.2)]
    assert [(link.stage.method, link.stage.strength) for link in links] == said
    assert all(prompt == "a hat" and options["seed"] == 7 for _, prompt, options in editor.asked)


def test_R13_a_stage_may_have_its_own_prompt_denoise_steps_and_seed() -> None:
    editor: Any = Adder()
    stages = (Stage(prompt="red", denoise=0.5, steps=3, seed=1), Stage())
    common: dict[str, Any] = {"num_inference_steps": 9, "seed": 4, "reference": Reference(negative=False)}
    list(run_stages(editor, black(), "blue", stages, **common))
    (_, first, one), (_, second, two) = editor.asked
    assert (first, one["denoise"], one["num_inference_steps"], one["seed"]) == ("red", 0.5, 3, 1)
    assert (second, two["num_inference_steps"], two["seed"]) == ("blue", 9, 4) and "denoise" not in two
    assert not one["reference"].negative and not two["reference"].negative


def test_R13_the_original_can_stay_as_the_second_reference() -> None:
    editor: Any = Adder()
    list(run_stages(editor, black(), "x", THREE_STAGES, keep_original=True))
    assert [seen for seen, _, _ in editor.asked] == [[0], [1, 0], [2, 0]]


def test_R21_a_chain_makes_one_picture_per_prompt_from_the_one_before_with_rising_seeds() -> None:
    editor: Any = Adder()
    links = list(run_chain(editor, black(), ["a", "b", "c"], seed=10, size=(2, 2)))
    assert [link.result.image.getpixel((0, 0)) for link in links] == [1, 2, 3]
    assert [(seen, prompt, options["seed"]) for seen, prompt, options in editor.asked] == [
        ([0], "a", 10),
        ([1], "b", 11),
        ([2], "c", 12),
    ]
    assert all(options["size"] == (2, 2) for *_, options in editor.asked)


def test_nothing_to_do_and_what_is_not_understood_are_refused() -> None:
    editor: Any = Adder()
    with pytest.raises(RequestError, match="stages must be at least one"):
        list(run_stages(editor, black(), "x", ()))
    with pytest.raises(RequestError, match="prompts must be at least one"):
        list(run_chain(editor, black(), ()))
    with pytest.raises(RequestError, match="seed must be at most"):
        list(run_chain(editor, black(), ["a", "b"], seed=2**63 - 1))
    with pytest.raises(RequestError, match="reference method"):
        Stage("mix")
    assert not editor.asked
