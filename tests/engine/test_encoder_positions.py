"""Positions, window order and patches of the prompt encoder against transformers' own functions."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import reference_pipeline, shared_pipeline
from qengine.engine.encoder.pictures import Patches, cut_patches
from qengine.engine.encoder.positions import mrope_positions
from qengine.engine.encoder.vision import patch_places, window_order
from qengine.errors import CheckpointError, KernelError
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

IMAGE = 7
GRIDS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def model() -> Any:
    return reference_pipeline(shared_pipeline("edit-2511")).text_encoder.model


def chat(texts: list[int], grids: list[tuple[int, int]]) -> torch.Tensor:
    """Text of the given lengths with one picture after each but the last."""
    tokens: list[int] = []
    for index, length in enumerate(texts):
        tokens += [1] * length
        if index < len(grids):
            tokens += [IMAGE] * (grids[index][0] * grids[index][1])
    return torch.tensor(tokens)


@given(grids=GRIDS, texts=st.lists(st.integers(1, 20), min_size=4, max_size=4))
@settings(max_examples=40, deadline=None)
def test_positions_equal_those_of_transformers_when_it_is_given_token_types(
    model: Any, grids: list[tuple[int, int]], texts: list[int]
) -> None:
    tokens = chat(texts[: len(grids) + 1], grids)
    thw = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    types = (tokens == IMAGE).int()[None]
    expected, _ = model.get_rope_index(tokens[None], types, image_grid_thw=thw)
    assert torch.equal(mrope_positions(tokens, IMAGE, grids), expected[:, 0])


def test_positions_of_text_alone_count_up_on_all_three_axes() -> None:
    assert torch.equal(mrope_positions(torch.ones(5, dtype=torch.int64), IMAGE, ()), torch.arange(5).expand(3, -1))


@pytest.mark.parametrize("grids", [[], [(2, 3)], [(3, 3)], [(2, 2), (1, 1)]])
def test_image_tokens_that_do_not_fit_the_grids_are_refused(grids: list[tuple[int, int]]) -> None:
    with pytest.raises(KernelError, match="image tokens"):
        mrope_positions(torch.tensor([1, IMAGE, IMAGE, IMAGE, IMAGE, 1]), IMAGE, grids)


@given(grids=GRIDS)
@settings(max_examples=40, deadline=None)
def test_windows_and_patch_places_equal_those_of_transformers(grids: list[tuple[int, int]]) -> None:
    patched = tuple((2 * rows, 2 * columns) for rows, columns in grids)
    thw = torch.tensor([[1, *grid] for grid in patched])
    order, lengths = window_order(Patches(torch.empty(0), patched, 2), 112 // 14)
    expected, boundaries = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
    assert torch.equal(order, expected)
    assert torch.equal(torch.tensor([0, *lengths]).cumsum(0), boundaries.long())
    places = torch.cat([patch_places(rows, columns, 2) for rows, columns in patched])
    assert torch.equal(places, get_vision_position_ids(thw, 2))


def test_patches_equal_those_of_the_processor_read_from_its_folder() -> None:
    folder = shared_pipeline("edit") / "processor"
    config = json.loads((folder / "preprocessor_config.json").read_text())
    images = [Image.new("RGB", (61, 143), (9, 99, 200)), Image.effect_noise((300, 77), 50).convert("RGB")]
    expected = Qwen2VLImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    made = cut_patches(images, config)
    assert torch.equal(made.values, expected["pixel_values"])
    assert [[1, *grid] for grid in made.grids] == expected["image_grid_thw"].tolist()
    assert sum(made.token_counts) * 4 == len(made.values)


def test_a_processor_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match="got CLIPImageProcessor"):
        cut_patches([Image.new("RGB", (64, 64))], {"image_processor_type": "CLIPImageProcessor"})
