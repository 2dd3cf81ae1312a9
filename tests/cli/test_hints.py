"""``qengine hints``: a prompt is looked at, or everything that is known is shown."""

from __future__ import annotations

import json

import pytest
from qengine.cli import main


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["hints", *words]) == 0
    return capsys.readouterr().out


def test_E19_a_prompt_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert "too dark" in said(capsys, "a dark temple with a monk standing")
    assert said(capsys, "make it grayscale") == "nothing known to go wrong with this prompt\n"
    assert [hint.split(":")[0] for hint in json.loads(said(capsys, "Stranger Things", "--json"))] == ["missing context"]


def test_R20_symptoms_presets_and_templates_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    for words in ("nothing changes", "--reference-strength 0.5 to 0.7", "cross_attn", "{costume}"):
        assert words in text
    assert json.loads(said(capsys, "--json"))["edit_types"]["colour"]["denoise"] == 0.4
