"""Help with words: templates are filled whole, and hints come where the cases call for them."""

from __future__ import annotations

import pytest
from qengine.engine.presets import EDIT_TYPES, PRESETS, TROUBLES, find
from qengine.engine.prompts import TEMPLATES, fill, hints, template_fields
from qengine.errors import RequestError


@pytest.mark.parametrize("name", ["character", "professional", "cinematic"])
def test_E18_a_template_fills_its_placeholders(name: str) -> None:
    fields = {field: f"<{field}>" for field in template_fields(name)}
    made = fill(name, fields)
    assert "{" not in made
    assert [made.index(text) for text in fields.values()] == sorted(made.index(text) for text in fields.values())


def test_E18_missing_empty_and_unknown_fields_are_named() -> None:
    fields = dict.fromkeys(template_fields("professional"), "x")
    with pytest.raises(RequestError, match="got lighting, mood missing"):
        fill("professional", {**fields, "mood": " ", "lighting": ""})
    with pytest.raises(RequestError, match="got colour unknown"):
        fill("professional", {**fields, "colour": "red"})
    with pytest.raises(RequestError, match=f"one of {', '.join(TEMPLATES)}, got 'poster'"):
        fill("poster", {})


@pytest.mark.parametrize(
    ("prompt", "case"),
    [
        ("a monk in a dark temple at night, robes, standing", "too dark"),
        ("nice", "vague"),
        ("Stranger Things", "missing context"),
        ("portrait of a man wearing a tuxedo, casino background", "glasses"),
        ("make the woman older, wearing her glasses, in daylight", "face shape"),
    ],
)
def test_E19_a_listed_case_is_warned_of(prompt: str, case: str) -> None:
    assert case in [hint.split(":")[0] for hint in hints(prompt)]


@pytest.mark.parametrize(
    "prompt",
    [
        "make it grayscale",
        "a street at night in the dark, neon signs, wet asphalt, walking away",
        "Tech CEO in a suit, on a stage, wearing glasses, blue lighting",
    ],
)
def test_E19_a_prompt_that_says_enough_gets_no_hint(prompt: str) -> None:
    assert not hints(prompt)


def test_R17_R18_tables_hold_the_midpoints() -> None:
    assert {name: (p.method, p.strength) for name, p in PRESETS.items()} == {
        "subtle": ("inject", 1.0),
        "style": ("concat", 0.6),
        "replace": ("cross_attn", 0.7),
        "scene": ("default", 0.4),
        "identity": ("inject", 1.15),
    }
    assert {name: (p.method, p.strength, p.denoise) for name, p in EDIT_TYPES.items()} == {
        "colour": ("inject", 0.9, 0.4),
        "style": ("concat", 0.6, 0.7),
        "swap": ("cross_attn", 0.7, 0.6),
        "add": ("default", 0.8, 0.5),
        "remove": ("inject", 1.1, 0.4),
        "lighting": ("concat", 0.7, 0.5),
        "expression": ("cross_attn", 1.0, 0.35),
        "background": ("default", 0.5, 0.7),
    }
    with pytest.raises(RequestError, match="preset must be one of subtle, style, replace, scene, identity, got 'loud'"):
        find(PRESETS, "loud", "preset")


def test_R20_every_symptom_names_a_setting() -> None:
    assert {"nothing changes", "structure is lost", "artefacts and distortions", "only a part changes"} <= set(TROUBLES)
    assert all("--" in advice or "qengine " in advice for advice in TROUBLES.values())
