"""Recipes, tables and defaults as the guides state them, and rounds of refinement."""

from __future__ import annotations

from typing import Any

import pytest
from qengine.engine.vl import (
    ALPHA_EFFECTS,
    COMPLEXITY,
    RECIPES,
    BlendKnobs,
    Knobs,
    Round,
    recipe,
    refine,
    rounds,
)
from qengine.errors import RequestError

TABLE = {
    "style_transfer": (-6, "all", "global", 70.0, 0.3, "interpolate", 0.9),
    "style_transfer_adain": (-6, "all", "global", 70.0, 0.3, "adain_per_dim", 0.9),
    "style_transfer_text": (-6, "text", "global", 70.0, 0.5, "interpolate", None),
    "variation": (-6, "all", "global", 70.0, 0.5, "interpolate", None),
    "composition": (-6, "image", "per_dim", 70.0, 0.2, "interpolate", None),
    "palette": (-6, "all", "global", 70.0, 0.15, "interpolate", None),
}


@pytest.mark.parametrize("name", TABLE)
def test_V28_a_recipe_is_the_listed_settings(name: str) -> None:
    found = recipe(name)
    knobs, blend = found.knobs, found.blend
    assert TABLE[name] == (
        *(knobs.hidden_layer, knobs.token_selection, knobs.normalization_mode, knobs.target_std),
        *(blend.alpha, blend.mode, found.strength),
    )
    assert found.steps == 9 and knobs.scale_to_text and knobs.outlier_masking == "none"
    assert (found.text is None) == (name == "composition")
    assert found.same_image == (name in ("style_transfer", "style_transfer_adain"))


def test_V28_the_recipes_are_these_and_another_name_is_an_error() -> None:
    assert set(RECIPES) == set(TABLE)
    with pytest.raises(RequestError, match="recipe must be one of style_transfer"):
        recipe("magic")


def test_defaults_are_the_resolved_ones() -> None:
    knobs, blend = Knobs(), BlendKnobs()
    assert (knobs.hidden_layer, knobs.token_selection, knobs.scale_to_text) == (-6, "all", True)
    assert (knobs.target_std, knobs.normalization_mode) == (70.0, "global")
    assert (knobs.outlier_masking, knobs.outlier_threshold, knobs.outlier_direction) == ("none", 10.0, "high")
    assert (blend.alpha, blend.mode, blend.protect_first_token) == (0.3, "interpolate", False)


def test_S23_alpha_and_strength_by_complexity() -> None:
    assert {name: (*level.alphas, level.strength) for name, level in COMPLEXITY.items()} == {
        "simple": (0.3, 0.3, 0.9),
        "medium": (0.3, 0.5, 0.9),
        "complex": (0.5, 0.5, 0.9),
    }
    ranges = [(effect.least, effect.most) for effect in ALPHA_EFFECTS]
    assert ranges == [(0, 0), (0.1, 0.2), (0.3, 0.3), (0.4, 0.5), (0.6, 0.7), (0.8, 0.9), (1, 1)]


def test_V33_each_round_starts_from_the_picture_of_the_round_before() -> None:
    seen: list[tuple[str, Round]] = []

    def make(image: str, setting: Round) -> str:
        seen.append((image, setting))
        return f"{image}>{setting.index}"

    made = list(refine("ref", make, rounds(3, alpha=[0.3, 0.2, 0.1], strength=0.9, seed=[1, 2, 3])))
    assert made == ["ref>0", "ref>0>1", "ref>0>1>2"]
    assert [image for image, _ in seen] == ["ref", "ref>0", "ref>0>1"]
    assert [(each.alpha, each.strength, each.seed) for _, each in seen] == [(0.3, 0.9, 1), (0.2, 0.9, 2), (0.1, 0.9, 3)]


def test_V33_one_round_is_a_plain_run() -> None:
    assert list(refine("ref", lambda image, _: image + "!", rounds(1))) == ["ref!"]
    assert rounds(1) == (Round(0, 0.3, 0.75, 42),)


@pytest.mark.parametrize("given", [{"count": 0}, {"count": 2, "alpha": [0.1]}, {"count": 1, "strength": 1.5}])
def test_V33_rounds_that_make_no_sense_are_an_error(given: Any) -> None:
    with pytest.raises(RequestError, match="must be"):
        rounds(**given)
