"""Stages and chains on the command line: every picture is written, and each is made from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_R13_three_stages_each_of_the_picture_before(engine, run) -> None:
    words = ["--stage", "default@0.4", "inject@0.8", "cross_attn@1.2", "--seed", "7"]
    code, out, _ = run("edit", "photo.png", "-p", "x", *words, "-o", "out.png", "-v")
    assert code == 0 and out.split() == ["out_1.png", "out_2.png", "out.png"]
    assert [tuple(map(str, request.images)) for request in engine.requests] == [
        ("photo.png",),
        ("out_1.png",),
        ("out_2.png",),
    ]
    used = [(request.reference.method, request.reference.strength, request.seed) for request in engine.requests]
    assert used == [("default", "0.4", 7), ("inject", "0.8", 7), ("cross_attn", "1.2", 7)]
    assert run("edit", "photo.png", "-p", "x", "--stage", "default", "inject", "--keep-original", "-o", "o.png")[0] == 0
    assert [str(path) for path in engine.requests[-1].images] == ["o_1.png", "photo.png"]


def test_R21_a_chain_of_prompts_with_one_seed_more_each(engine, run) -> None:
    code, out, _ = run("edit", "photo.png", "-p", "a", "--then", "b", "--then", "c", "--seed", "3", "-o", "out.png")
    assert code == 0 and out.split() == ["out_1.png", "out_2.png", "out.png"]
    assert [(request.prompt, request.seed) for request in engine.requests] == [("a", 3), ("b", 4), ("c", 5)]
    assert [Path(request.images[0]).name for request in engine.requests] == ["photo.png", "out_1.png", "out_2.png"]


@pytest.mark.parametrize(
    "words",
    [
        ("--stage", "mix@1"),
        ("--stage", "default@3"),
        ("--stage", "default", "--then", "b"),
        ("--then", "b", "--count", "2"),
        ("--then", "b", "--output-type", "latents"),
    ],
)
def test_what_makes_no_chain_is_refused(engine, run, words: tuple[str, ...]) -> None:
    assert run("edit", "photo.png", "-p", "x", *words)[0] == 2
    assert not engine.requests


def test_pictures_on_the_way_never_overwrite_what_is_there(engine, run) -> None:
    Path("out_1.png").write_bytes(Path("photo.png").read_bytes())
    code, _, err = run("edit", "out_1.png", "-p", "a", "--then", "b", "-o", "out.png")
    assert code == 2 and "must differ from the input pictures" in err
    code, _, err = run("edit", "photo.png", "-p", "a", "--then", "b", "-o", "out.png")
    assert code == 3 and "out_1.png must be a new file" in err and not engine.requests


def test_a_batch_refuses_chains(engine, run) -> None:
    assert run("batch", ".", "-p", "x", "--then", "b", "-o", "out")[0] == 8
    assert not engine.requests
