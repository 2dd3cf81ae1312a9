"""The flags of picture conditioning say what the engine's knobs say, no more and no less."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from qengine.cli import blend
from qengine.cli.command import Command
from qengine.engine.vl import RECIPES, BlendKnobs, Knobs
from qengine.engine.vl import knobs as engine_knobs
from qengine.errors import RequestError

SECTIONS = {"VL": blend.VL, "Knobs": blend.KNOBS, "Blend": blend.BLEND}


def parsed(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    command = Command("x", lambda **values: found.update(values), SECTIONS)
    command.main(list(words), standalone_mode=False)
    return found


def test_choices_are_those_of_the_engine() -> None:
    modes = set(get_args(engine_knobs.BlendMode)) - {"style_delta", "attention_weighted"}
    assert set(blend.BLENDS) == modes
    assert set(blend.RECIPES) == set(RECIPES)
    pairs = {
        blend.SELECTIONS: engine_knobs.Selection,
        blend.NORMALISATIONS: engine_knobs.Normalisation,
        blend.OUTLIER_MODES: engine_knobs.OutlierMode,
        blend.DIRECTIONS: engine_knobs.Direction,
        blend.SCALE_STATS: engine_knobs.ScaleStat,
        blend.CURVES: engine_knobs.Curve,
        blend.COMPRESSIONS: engine_knobs.Compression,
    }
    assert all(set(words) == set(get_args(choices)) for words, choices in pairs.items())


def test_nothing_said_is_the_defaults_or_what_the_file_says() -> None:
    values = parsed()
    assert blend.knobs_of(values) == Knobs()
    assert blend.blend_of(values) == BlendKnobs()
    assert blend.knobs_of(values, Knobs(hidden_layer=-2)).hidden_layer == -2
    assert blend.blend_of(values, base=BlendKnobs(mode="adain")).mode == "adain"


def test_every_flag_reaches_its_knob() -> None:
    values = parsed(
        *("--hidden_layer", "-2:0.7", "-6:0.3", "--vl-token-selection", "image", "--scale-to-text", "off"),
        *("--target_std", "auto", "--normalization", "hybrid", "--scale-stat", "robust", "--clip-sigma", "none"),
        *("--hybrid-weight", "0.2", "--outlier_masking", "zero", "--outlier-threshold", "5"),
        *("--outlier-direction", "both", "--vl-alpha", "0.4", "--blend-mode", "per_token", "--protect-first-token"),
        *("--start-alpha", "0.1", "--alpha-curve", "ease_in", "--token-alphas", "0.1", "0.2", "--compress", "pool"),
    )
    assert blend.knobs_of(values) == Knobs(
        {-2: 0.7, -6: 0.3}, "image", False, "auto", "hybrid", "robust", None, 0.2, "zero", 5.0, "both"
    )
    assert blend.blend_of(values) == BlendKnobs(0.4, "per_token", True, 0.1, "ease_in", (0.1, 0.2), "pool")
    assert blend.blend_of(values, alpha=0.9).alpha == 0.9


@pytest.mark.parametrize("words", [["--hidden-layer", "-6"], ["--hidden-layer=-6"], ["--hidden_layer", "-6:0.5"]])
def test_one_layer_is_that_layer(words: list[str]) -> None:
    assert blend.knobs_of(parsed(*words)).hidden_layer == -6


def test_several_negative_layers_stand_after_one_flag() -> None:
    assert blend.knobs_of(parsed("--hidden-layer", "-2", "-6", "--alpha", "0")).hidden_layer == {-2: 1, -6: 1}


def test_V28_a_preset_resolves_to_its_knobs_and_flags_beside_it_win() -> None:
    for name in blend.RECIPES:
        values = parsed("--vl-preset", name)
        assert blend.knobs_of(values, Knobs(hidden_layer=-2)) == RECIPES[name].knobs
        assert blend.blend_of(values, base=BlendKnobs(mode="linear")) == RECIPES[name].blend
    values = parsed("--vl-preset", "composition", "--alpha", "0.7", "--target-std", "61")
    assert blend.blend_of(values).alpha == 0.7
    assert blend.knobs_of(values).target_std == 61
    assert blend.knobs_of(values).token_selection == "image"


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (("--image-tokens-only", "--text-tokens-only"), "token selection"),
        (("--target-std", "tall"), "--target-std"),
        (("--target-std", "-1"), "target_std"),
        (("--hidden-layer", "-2", "-2"), "--hidden-layer"),
        (("--alpha", "1.5"), "alpha"),
        (("--outlier-threshold", "0"), "outlier_threshold"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], subject: str) -> None:
    values = parsed(*words)
    with pytest.raises(RequestError, match=f"^{subject}"):
        blend.knobs_of(values)
        blend.blend_of(values)


def test_V24_no_flag_asks_for_the_vision_towers_own_output() -> None:
    names = {flag.key for section in SECTIONS.values() for flag in section}
    assert not [name for name in names if "vision" in name or "tower" in name]
