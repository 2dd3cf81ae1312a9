"""Methods and strengths as they are written, and what they say for each step."""

from __future__ import annotations

import pytest
from qengine.engine.keep.options import Keep
from qengine.engine.reference.options import METHODS, Reference, StepReference, schedule, segments
from qengine.errors import RequestError


def test_R06_an_unknown_method_is_refused_with_the_four_names() -> None:
    with pytest.raises(RequestError, match=f"one of {', '.join(METHODS)}, got 'mix'"):
        Reference(method="mix")


@pytest.mark.parametrize("strength", [-0.1, 2.01, "x", "0.5:", "0.5:3", "nan", True, ""])
def test_R07_a_strength_outside_0_to_2_is_refused(strength) -> None:
    with pytest.raises(RequestError, match="reference strength must be from 0 to 2"):
        Reference(strength=strength)


def test_R07_the_default_is_1_and_above_one_and_a_half_there_is_a_warning() -> None:
    assert Reference().strength == 1.0 and not Reference(strength=1.5).notes()
    assert "artefacts, got 1.6" in Reference(strength=1.6).notes()[0]
    assert "artefacts, got 1.8" in Reference(method="concat@1.8:0.5,inject").notes()[0]


def test_R12_one_strength_holds_in_every_step() -> None:
    assert Reference(strength=0.7).table(5, 2) == (StepReference("default", (0.7, 0.7)),) * 5


def test_R14_a_strength_rises_over_the_steps() -> None:
    rising = [use.strengths[0] for use in Reference(strength="0.2:1.0").table(5, 1)]
    assert rising == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule("0:1:ease_in", 3) == (0.0, 0.25, 1.0) and schedule("0:1:ease_out", 3) == (0.0, 0.75, 1.0)
    assert schedule("0.5:1", 1) == (0.5,)
    assert schedule("0.1,0.2,0.3", 3) == (0.1, 0.2, 0.3)
    with pytest.raises(RequestError, match="one number per step \\(4\\), got 3 numbers"):
        schedule("0.1,0.2,0.3", 4)


def test_R15_methods_switch_at_a_fraction_and_the_first_gets_the_odd_step() -> None:
    switching = Reference(method="concat:0.5,inject")
    assert [use.method for use in switching.table(8, 1)] == ["concat"] * 4 + ["inject"] * 4
    assert [use.method for use in switching.table(5, 1)] == ["concat"] * 3 + ["inject"] * 2
    own = Reference(method="concat@0.6:0.5,inject", strength=1.2).table(4, 1)
    assert [use.strengths[0] for use in own] == [0.6, 0.6, 1.2, 1.2]


@pytest.mark.parametrize("method", ["concat:0.5", "concat,inject", "concat:0.6,inject:0.5", "concat:0,inject", "a:b,c"])
def test_methods_whose_fractions_do_not_rise_to_the_end_are_refused(method: str) -> None:
    with pytest.raises(RequestError):
        segments(method)


def test_R22_strengths_are_one_for_all_or_one_per_picture() -> None:
    assert Reference(strength=(1.0, 0.0)).table(2, 2)[0].strengths == (1.0, 0.0)
    with pytest.raises(RequestError, match="one per picture \\(3\\), got 2"):
        Reference(strength=(1.0, 0.0)).table(2, 3)


def test_only_what_was_changed_is_recorded() -> None:
    assert Reference().record() == {} and Keep().record() == {}
    assert Reference(method="inject", strength=(1, "0.2:1")).record() == {"method": "inject", "strength": [1, "0.2:1"]}
    assert Keep(mask="m.png", feather_pixels=2).record() == {"feather_pixels": 2}


def test_M35_mask_and_region_change_mask_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="in one way, got mask and rcm"):
        Keep(mask="m.png", rcm=True)
    with pytest.raises(RequestError, match="got rcm_threshold and rcm_relative_threshold"):
        Keep(rcm_threshold=0.1, rcm_relative_threshold=0.1)
    assert [Keep().rule, Keep(mask="m").rule, Keep(rcm=True).rule, Keep(rcm_threshold=0.0).rule] == [
        None,
        "mask",
        "rcm",
        "musubi",
    ]


@pytest.mark.parametrize(
    "field", [{"rcm_sensitivity": 2}, {"rcm_kernel_size": 33}, {"rcm_threshold": -1}, {"feather_pixels": -1}]
)
def test_values_out_of_range_are_refused(field) -> None:
    with pytest.raises(RequestError, match=next(iter(field))):
        Keep(**field)
