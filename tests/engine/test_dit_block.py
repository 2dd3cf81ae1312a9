"""One block: its ranges of modulation, its last visit, its fused kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from qengine.engine.dit.block import BlockRows, DoubleStreamBlock, Modulation, Ranges, Rotations
from qengine.engine.dit.kernels import DEFINITIONS, Kernels
from qengine.engine.dit.rope import image_rotations, text_rotations
from qengine.engine.quant import QuantLinear, quantise_module, quantise_weight
from torch import nn

from tests.kernels.counting import counted

FUSED = Kernels(modulate="triton", rope="triton")
AXES = (4, 6, 6)
FLIPPED = 1e-2
"""A number that rounds to the next of 127 steps because of its last bit moves what is computed from 8-bit tokens."""


def test_X05_sliced_modulation_equals_the_per_token_form() -> None:
    generator = torch.Generator().manual_seed(4)
    x, update = (torch.randn(1, 11, 16, generator=generator) for _ in range(2))
    target, other = (Modulation(*(torch.randn(16, generator=generator) for _ in range(3))) for _ in range(2))
    index = (torch.arange(11) >= 7)[None, :, None]
    picked = Modulation(*(torch.where(index, b, a) for a, b in zip(target, other, strict=True)))
    expected = F.layer_norm(x, (16,), eps=1e-6) * (1 + picked.scale) + picked.shift
    ranges = Ranges(target, other, 7)
    assert torch.equal(ranges.modulate(x, DEFINITIONS), expected)
    torch.testing.assert_close(ranges.add(x.clone(), nn.Identity(), update, DEFINITIONS), x + picked.gate * update)


def one_block(dim: int, heads: int, weight_format: str = "bf16", seed: int = 3) -> DoubleStreamBlock:
    """A block with random weights, of 8 bits where the format says so."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() > 1 else 0.3)
        for name, parameter in DoubleStreamBlock(dim, heads).named_parameters()
    }
    with torch.device("meta"):
        block = DoubleStreamBlock(dim, heads)
    quantise_module(block, weight_format)
    for name, module in block.named_modules():
        if isinstance(module, QuantLinear):
            values[f"{name}.weight"], values[f"{name}.scale"] = quantise_weight(values[f"{name}.weight"], weight_format)
    block.load_state_dict(values, assign=True)
    return block.requires_grad_(False)


def inputs_of(dim: int, axes, grids=((3, 4), (2, 4)), length: int = 6, seed: int = 5) -> tuple:
    """Image and text states, modulation rows with those of timestep zero, rotations."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(rows * columns for rows, columns in grids)
    image, text = (torch.randn(1, count, dim, generator=generator) for count in (tokens, length))
    rows = BlockRows(*(torch.randn(6 * dim, generator=generator) for _ in range(3)))
    return image, text, rows, Rotations(text_rotations(length, grids, axes), image_rotations(grids, axes))


def test_X05_the_last_block_computes_only_what_is_read() -> None:
    block = one_block(32, 2)
    image, text, *rest = inputs_of(32, AXES)
    full, _ = block(image.clone(), text.clone(), *rest, 12)
    partial = block.forward_last(image.clone(), text.clone(), *rest, 12)
    torch.testing.assert_close(partial, full[:, :12], atol=1e-5, rtol=1e-5)
    assert partial.shape == (1, 12, 32)


@pytest.mark.parametrize("weight_format", ["bf16", "int8"])
@pytest.mark.parametrize("last", [False, True])
def test_a_block_of_fused_kernels_equals_the_reference(weight_format: str, last: bool, monkeypatch) -> None:
    pytest.importorskip("triton")
    from qengine.kernels.modulate import triton as modulate
    from qengine.kernels.rope import triton as rope

    names = ((modulate, "_modulate_kernel"), (modulate, "_add_gated_kernel"), (rope, "_norm_rope_kernel"))
    counts = [counted(monkeypatch, module, name) for module, name in names]
    block = one_block(30, 3, weight_format)
    image, text, *rest = inputs_of(30, (2, 4, 4))
    run = block.forward_last if last else block
    made = [run(image.clone(), text.clone(), *rest, 12, kernels) for kernels in (DEFINITIONS, FUSED)]
    bound = 1e-5 if weight_format == "bf16" else FLIPPED
    for expected, found in [made] if last else zip(*made, strict=True):
        assert expected.abs().max() > 1
        torch.testing.assert_close(found, expected, atol=bound, rtol=bound)
    added = (2 if last else 4) if weight_format == "bf16" else 0
    assert [each.launches for each in counts] == [3 if last else 4, added, 3 if last else 4]


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
def test_reference_tokens_take_the_rows_of_timestep_zero_in_every_format(weight_format: str) -> None:
    block = one_block(32, 2, weight_format)
    image, text, rows, rotations = inputs_of(32, AXES)
    swapped = BlockRows(rows.reference, rows.text, rows.image)
    first, _ = block(image.clone(), text.clone(), rows, rotations, 20)
    alone, _ = block(image.clone(), text.clone(), BlockRows(rows.image, rows.text), rotations, 12)
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=1e-5)
    one, _ = block(image.clone(), text.clone(), rows, rotations, 0)
    other, _ = block(image.clone(), text.clone(), swapped, rotations, 20)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert (one - first).abs().max() > 0.1
