"""The pre-parser: other tools' command lines become the one that is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qengine.cli.expand import expand
from qengine.cli.options import EDIT_SECTIONS, GENERATE_SECTIONS, flags_by_spelling

FLAGS = flags_by_spelling(EDIT_SECTIONS.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            ["--control_image_path", "a", "b", "-p", "x"],
            ["--control-image-path", "a", "--control-image-path", "b", "-p", "x"],
        ),
        (["--ref", "a.png", "b.png", "make it red"], ["--ref", "a.png", "--ref", "b.png", "make it red"]),
        (["make it red", "--ref", "a.png", "b.png"], ["make it red", "--ref", "a.png", "--ref", "b.png"]),
        (["--image", "a.png", "make it red", "-o", "b.png"], ["--image", "a.png", "make it red", "-o", "b.png"]),
        (["a.png", "x", "--image_size", "768", "1376"], ["a.png", "x", "--image-size", "768 1376"]),
        (["a.png", "x", "--image_size=768,1376", "-q"], ["a.png", "x", "--image-size=768,1376", "-q"]),
        (["a.png", "x", "--true_cfg_scale=2_0"], ["a.png", "x", "--true-cfg-scale=2_0"]),
        (["a_b.png", "x_y", "-o", "c_d.png"], ["a_b.png", "x_y", "-o", "c_d.png"]),
        (["a.png", "--", "--odd_prompt"], ["a.png", "--", "--odd_prompt"]),
        (["--ref", "a.png", "--", "x"], ["--ref", "a.png", "--", "x"]),
        (["a.png", "x", "--seed", "-1"], ["a.png", "x", "--seed", "-1"]),
        (["--ref"], ["--ref"]),
    ],
)
def test_a_line_is_rewritten(line: list[str], expected: list[str]) -> None:
    assert expand(line, FLAGS) == expected


@given(st.lists(st.text(alphabet="ab-_= .", max_size=6), max_size=8))
def test_words_are_neither_lost_nor_invented(words: list[str]) -> None:
    once = expand(words, FLAGS)
    assert " ".join(once).replace("-", "_").split() == " ".join(words).replace("-", "_").split()


def test_every_spelling_means_one_flag() -> None:
    for sections in (EDIT_SECTIONS, GENERATE_SECTIONS):
        spellings = [spelling for flags in sections.values() for flag in flags for spelling in flag.spellings]
        assert len(spellings) == len(set(spellings))
        assert all("_" not in spelling for spelling in spellings)
