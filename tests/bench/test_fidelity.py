"""What weight formats cost in accuracy: the measurement in miniature."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from qengine.bench import fidelity
from qengine.bench.drift import ssim
from qengine.bench.readme import FIDELITY_GOAL, fidelity_table
from qengine.bench.tiny.evaluate import PHOTOS, photos
from qengine.bench.tiny.model import to_tensor

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    """The lines in the file after the command at toy size."""
    path = tmp_path_factory.mktemp("fidelity") / "fidelity.jsonl"
    path.write_text("old\n")
    assert fidelity.main(["--toy", "--tokens", "16", "--json", str(path)]) == 0
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def errors(lines: Lines) -> dict[tuple[str, str], float]:
    return {(line["values"], line["format"]): line["relative_l2"] for line in lines if line["kind"] == "linear"}


def test_every_way_of_drawing_and_format_has_a_line_with_its_origin(toy: Lines) -> None:
    assert set(errors(toy)) == {(values, name) for values in fidelity.VALUES for name in fidelity.FORMATS}
    assert all(line["versions"]["torch"] and line["machine"] and "commit" in line for line in toy)


def test_rotation_keeps_outliers_from_costing_accuracy(toy: Lines) -> None:
    found = errors(toy)
    for values in fidelity.VALUES:
        assert 0 < found[values, "bf16"] < found[values, "int8"] <= FIDELITY_GOAL < found[values, "fp8"]
        assert found[values, "fp8, weights alone"] < found[values, "fp8"]
    for values in ("Student t, 3 degrees", "outlier columns"):
        assert found[values, "int8, not rotated"] > 2 * found[values, "int8"]


def test_M24_embeddings_of_an_8_bit_text_encoder_point_the_way_those_of_bf16_do(toy: Lines) -> None:
    drift = {line["format"]: line for line in toy if line["kind"] == "drift"}
    assert set(drift) == {"bf16", "int8", "fp8"}
    assert drift["bf16"]["embeds_least_cosine"] == pytest.approx(1, abs=1e-6)
    assert all(0.99 < drift[name]["embeds_least_cosine"] < 0.9999999 for name in ("int8", "fp8"))


def test_the_picture_drifts_more_in_fp8_than_in_int8_and_least_in_bf16(toy: Lines) -> None:
    drift = [line for line in toy if line["kind"] == "drift"]
    assert [line["format"] for line in drift] == ["bf16", "int8", "fp8"]
    latents = [line["latents_relative_l2"] for line in drift]
    assert 0 < latents[0] < latents[1] < latents[2] < 0.1
    assert all(line["psnr"] > 35 and line["ssim"] > 0.99 and line["runs"] == 1 for line in drift)


def test_the_table_has_every_figure_and_judges_the_goal(toy: Lines) -> None:
    text = fidelity_table(toy)
    assert f"the goal of at most {FIDELITY_GOAL} is reached" in text
    assert all(f"{value:.4f}" in text for value in errors(toy).values())
    bad = [line | {"relative_l2": 0.013} if line.get("format") == "int8" and "layer" in line else line for line in toy]
    assert f"Largest error of int8: 0.0130; the goal of at most {FIDELITY_GOAL} is missed" in fidelity_table(bad)


def test_layers_have_their_true_shapes() -> None:
    assert fidelity.linear_shapes() == {
        "attn.to_q": (3072, 3072),
        "img_mlp.net.0.proj": (12288, 3072),
        "img_mlp.net.2": (3072, 12288),
        "txt_in": (3072, 3584),
    }


def test_the_tails_of_the_values_are_what_their_names_say() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (400, 400)
    beyond = {name: (draw(shape, generator).abs() > 5).float().mean() for name, draw in DRAWS.items()}
    assert beyond["normal"] < 1e-4
    assert beyond["student"] == pytest.approx(0.0154, rel=0.1)  # P(|t| > 5) with 3 degrees of freedom
    assert (fidelity.planted(shape, generator).std(0) > 25).sum() == fidelity.OUTLIERS


DRAWS = {"normal": fidelity.normal, "student": fidelity.student}


def test_ssim_is_1_for_the_same_picture_and_that_of_its_formula_for_others() -> None:
    picture = to_tensor(photos(PHOTOS)["cat"].resize((48, 40)))
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    flat, other = torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.6)
    assert ssim(flat, other) == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4), rel=1e-6)
    noisy = (picture + 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert ssim(picture, noisy) == pytest.approx(ssim(noisy, picture)) and 0.2 < ssim(picture, noisy) < 0.9
    assert ssim(picture, 1 - picture) < 0
