"""Presets by goal and by kind of edit."""

from __future__ import annotations

import pytest
from qengine.engine.presets import settle
from qengine.engine.reference.options import Reference
from qengine.errors import RequestError

GOALS = {
    "subtle": ("inject", 0.8, 1.2),
    "style": ("concat", 0.5, 0.7),
    "replace": ("cross_attn", 0.6, 0.8),
    "scene": ("default", 0.3, 0.5),
    "identity": ("inject", 1.0, 1.3),
}
KINDS = {
    "colour": ("inject", 0.8, 1.0, 0.3, 0.5),
    "style": ("concat", 0.5, 0.7, 0.6, 0.8),
    "swap": ("cross_attn", 0.6, 0.8, 0.5, 0.7),
    "add": ("default", 0.7, 0.9, 0.4, 0.6),
    "remove": ("inject", 1.0, 1.2, 0.3, 0.5),
    "lighting": ("concat", 0.6, 0.8, 0.4, 0.6),
    "expression": ("cross_attn", 0.9, 1.1, 0.3, 0.4),
    "background": ("default", 0.4, 0.6, 0.6, 0.8),
}


@pytest.mark.parametrize("name", GOALS)
def test_R17_a_preset_is_its_method_at_the_middle_of_its_range(name: str) -> None:
    method, low, high = GOALS[name]
    made = settle(preset=name)
    assert made.reference.method == method and made.denoise is None
    assert made.reference.strength == pytest.approx((low + high) / 2)


@pytest.mark.parametrize("name", KINDS)
def test_R18_a_kind_of_edit_is_its_method_strength_and_denoise(name: str) -> None:
    method, low, high, least, most = KINDS[name]
    made = settle(edit_type=name)
    assert made.reference.method == method
    assert made.reference.strength == pytest.approx((low + high) / 2)
    assert made.denoise == pytest.approx((least + most) / 2)


def test_R17_R18_what_is_said_beside_a_preset_wins() -> None:
    made = settle(preset="style", strength=0.0, negative=False)
    assert made.reference == Reference(method="concat", strength=0.0, negative=False)
    made = settle(edit_type="colour", method="default", denoise=1.0)
    assert (made.reference.method, made.reference.strength, made.denoise) == ("default", 0.9, 1.0)
    assert settle() == settle(method="default", strength=1.0)
    assert settle().reference == Reference() and settle().denoise is None


def test_unknown_names_and_two_tables_at_once_are_refused() -> None:
    with pytest.raises(RequestError, match="preset must be one of subtle, style"):
        settle(preset="bold")
    with pytest.raises(RequestError, match="edit type must be one of colour"):
        settle(edit_type="color")
    with pytest.raises(RequestError, match="one table"):
        settle(preset="style", edit_type="style")
