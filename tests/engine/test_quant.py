"""Blocks of 8-bit weights: the names, the rebinding, and how far the outputs drift."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qengine.engine import quant
from qengine.engine.dit.block import BlockRows, DoubleStreamBlock, Rotations
from qengine.engine.formats import QUANTISED, rotation_group, slab_specs
from qengine.engine.layout import SlabLayout
from qengine.engine.quant import QuantLinear, dequantise_weight, linear, project, quantise_module, quantise_weight
from qengine.engine.template import Template, aligned_bytes, dtype_name
from qengine.errors import RequestError
from qengine.kernels.epilogue import Epilogue
from qengine.kernels.linear_int8 import linear_int8
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

CPU = torch.device("cpu")
KEPT = ("img_mlp.net.2.weight", "txt_mlp.net.2.weight")
LAYER = Qwen2_5_VLTextConfig(
    hidden_size=256,
    intermediate_size=592,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
)
LAYER._attn_implementation = "sdpa"

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "dit": lambda: DoubleStreamBlock(256, 2),
    "encoder": lambda: modeling.Qwen2_5_VLDecoderLayer(LAYER, layer_idx=0),
}


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return make().to(dtype)


def random_tensors(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights of a trained look: matrices of variance 1 / columns, norms near 1."""
    tensors = {}
    for name, value in module.named_parameters():
        drawn = torch.randn(value.shape)
        if value.dim() == 2:
            drawn /= value.shape[1] ** 0.5
        elif name.endswith("weight"):
            drawn = 1 + 0.1 * drawn
        tensors[name] = drawn.to(dtype)
    return tensors


def quantised(tensors: dict[str, torch.Tensor], specs: Any, weight_format: str) -> dict[str, torch.Tensor]:
    """A slab of these specs, filled; every byte is 0xff before."""
    layout = SlabLayout.of(specs)
    views = layout.views(aligned_bytes(layout.nbytes, CPU).fill_(255))
    for name, tensor in tensors.items():
        if specs[name][1] == QUANTISED.get(weight_format):
            stored, scale = quantise_weight(tensor, weight_format)
            views[name].copy_(stored)
            views[name.removesuffix("weight") + "scale"].copy_(scale)
        else:
            views[name].copy_(tensor)
    return views


def build(
    make: Callable[[], nn.Module], weight_format: str, dtype: torch.dtype, keep: tuple[str, ...] = ()
) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """A block with random weights, the same in the weight format over a slab, and the slab's views."""
    plain = on_meta(make, dtype)
    tensors = random_tensors(plain, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    specs = slab_specs(shapes, weight_format, dtype_name(dtype), keep)
    template = on_meta(make, dtype)
    quantise_module(template, weight_format, keep)
    views = quantised(tensors, specs, weight_format)
    return Template(plain).bind(tensors), Template(template).bind(views), views


def dit_inputs(dim: int, heads: int, dtype: torch.dtype, images: int = 24, texts: int = 9) -> Callable[[], Any]:
    rows = BlockRows(*(0.3 * torch.randn(6 * dim).to(dtype) for _ in range(3)))
    angles = torch.randn(images + texts, dim // heads // 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    image, text = torch.randn(1, images, dim).to(dtype), torch.randn(1, texts, dim).to(dtype)
    rotations = Rotations(turns[:texts], turns[texts:])
    return lambda: (image.clone(), text.clone(), rows, rotations, images // 2)


def largest_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(
    ("block", "keep"), [("dit", ()), ("dit", KEPT), ("encoder", ()), ("encoder", ("mlp.down_proj.weight",))]
)
def test_a_quantised_block_has_the_tensors_of_its_slab(block: str, keep, weight_format: str, dtype) -> None:
    plain, module = (on_meta(BLOCKS[block], dtype) for _ in range(2))
    specs = slab_specs({n: tuple(p.shape) for n, p in plain.named_parameters()}, weight_format, dtype_name(dtype), keep)
    quantise_module(module, weight_format, keep)
    found = [(n, (tuple(p.shape), dtype_name(p.dtype))) for n, p in module.named_parameters()]
    assert found == list(specs.items())
    assert all(p.is_meta and not p.requires_grad for p in Template(module).module.parameters())
    layers = [m for m in module.modules() if isinstance(m, QuantLinear)]
    linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == (0 if weight_format == "bf16" else len(linears) - len(keep))


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
@pytest.mark.parametrize("shape", [(48, 64), (19, 36), (7, 423)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_runs_its_tensors_by_the_op_of_its_format(weight_format: str, shape, bias: bool) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    layer = QuantLinear(linear, weight_format)
    stored, scale = quantise_weight(linear.weight.detach(), weight_format)
    views = {"weight": stored, "scale": scale} | ({"bias": linear.bias.detach()} if bias else {})
    bound = Template(layer).bind(views)
    x = torch.randn(2, 3, shape[1])
    with torch.no_grad():
        exact = F.linear(x, dequantise_weight(stored, scale), linear.bias)
        found = bound(x)
    assert found.shape == (2, 3, shape[0])
    if weight_format == "fp8":
        assert layer.group == 1 and torch.equal(found, exact)
    else:
        assert layer.group == rotation_group(shape[1]) and not torch.equal(found, exact)
        assert float((found - exact).norm() / exact.norm()) < 0.015


def bound_layer(weight_format: str, outputs: int = 20, **choices: Any) -> QuantLinear:
    """A layer of 64 columns over random weights."""
    plain = nn.Linear(64, outputs)
    layer = QuantLinear(plain, weight_format, **choices)
    stored, scale = quantise_weight(plain.weight.detach(), weight_format)
    return Template(layer).bind({"weight": stored, "scale": scale, "bias": plain.bias.detach()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_layer_with_an_epilogue_has_the_bits_of_the_torch_calls_it_stands_for(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 48).to(dtype).requires_grad_(False)
    x, residual = torch.randn(1, 9, 64).to(dtype), torch.randn(1, 9, 48).to(dtype)
    first, rest = torch.randn(2, 48).to(dtype)
    y = layer(x)
    assert torch.equal(linear(layer, x), y)
    assert torch.equal(linear(layer, x, Epilogue(gelu=True)), F.gelu(y, approximate="tanh"))
    exact = residual.clone()
    exact[:, :4].addcmul_(y[:, :4], first)
    exact[:, 4:].addcmul_(y[:, 4:], rest)
    epilogue = Epilogue(gate=first, gate_rest=rest, split=4, residual=residual)
    assert torch.equal(linear(layer, x, epilogue), exact) and not torch.equal(residual, exact)
    assert linear(layer, x, epilogue, out=residual) is residual and torch.equal(residual, exact)


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_a_quantised_layer_takes_the_epilogue_and_the_place_of_its_result(weight_format: str) -> None:
    layer, x = bound_layer(weight_format), torch.randn(1, 5, 64)
    gate, residual, out = torch.randn(20), torch.randn(1, 5, 20), torch.empty(1, 5, 20)
    with torch.no_grad():
        y = layer(x)
        found = linear(layer, x, Epilogue(gate=gate, residual=residual), out)
        assert found is out and torch.allclose(out, residual + gate * y, atol=1e-6)
        assert torch.allclose(linear(layer, x, Epilogue(gelu=True)), F.gelu(y, approximate="tanh"), atol=1e-6)


@pytest.mark.parametrize(
    ("formats", "times"), [(["int8"] * 3, 1), (["int8", "int8", None], 2), (["fp8"] * 3, 0), ([None] * 3, 0)]
)
def test_layers_that_share_an_input_quantise_it_once(formats, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(64, 20) if each is None else bound_layer(each) for each in formats]
    x, made = torch.randn(1, 5, 64), []
    with torch.no_grad():
        exact = [layer(x) for layer in layers]
        real = quant.make_tokens
        monkeypatch.setattr(quant, "make_tokens", lambda *arguments: made.append(arguments) or real(*arguments))
        place = torch.empty(1, 5, 20)
        found = project(x, layers, [None, place, None])
    assert len(made) == times and found[1] is place
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_a_layer_runs_in_the_implementation_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(options["implementation"])
        return linear_int8(*arguments, **options)

    monkeypatch.setattr(quant, "linear_int8", spy)
    block = on_meta(BLOCKS["dit"], torch.float32)
    quantise_module(block, "int8", implementation="int_mm")
    layers = [layer for layer in block.modules() if isinstance(layer, QuantLinear)]
    assert layers and {(layer.implementation, layer.quantiser) for layer in layers} == {("int_mm", "reference")}
    assert bound_layer("int8", implementation="triton").quantiser == "triton"
    assert bound_layer("fp8", implementation="triton", quantiser="native").quantiser == "native"
    with torch.no_grad():
        bound_layer("int8", implementation="int_mm")(torch.randn(2, 64))
    assert asked == ["int_mm"]


@pytest.mark.parametrize(("weight_format", "stored"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_quantised_layers_hold_plain_tensors_that_move_and_copy(weight_format: str, stored: torch.dtype) -> None:
    module, views = build(BLOCKS["dit"], weight_format, torch.bfloat16)[1:]
    assert {type(view) for view in views.values()} == {torch.Tensor}
    assert {view.dtype for view in views.values()} == {stored, torch.float32, torch.bfloat16}
    with torch.no_grad():
        inputs = dit_inputs(256, 2, torch.bfloat16)
        first = module(*inputs())
        again = copy.deepcopy(module)(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_where_the_slab_lies_changes_no_bit(weight_format: str, dtype: torch.dtype) -> None:
    module, views = build(BLOCKS["dit"], weight_format, dtype)[1:]
    inputs = dit_inputs(256, 2, dtype)
    template = Template(on_meta(BLOCKS["dit"], dtype))
    quantise_module(template.module, weight_format)
    moved = Template(template.module)
    shift = aligned_bytes(4096 + sum(view.nbytes + 256 for view in views.values()), CPU)[256:]
    places, start = {}, 0
    for name, view in views.items():
        places[name] = shift[start : start + view.nbytes].view(view.dtype).view(view.shape).copy_(view)
        start += -(-view.nbytes // 256) * 256
    with torch.no_grad():
        first, second = module(*inputs()), moved.bind(places)(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("dim", "heads"), [(768, 6), pytest.param(3072, 24, marks=pytest.mark.slow)], ids=["quarter", "full"]
)
@pytest.mark.parametrize(("weight_format", "bound"), [("fp8", 0.05), ("int8", 0.05)])
def test_M22_a_dit_block_of_8_bit_weights_stays_within_five_percent(weight_format, bound, dim: int, heads: int) -> None:
    plain, module, views = build(lambda: DoubleStreamBlock(dim, heads), weight_format, torch.float32)
    stored = {n for n, view in views.items() if view.dtype in (torch.float8_e4m3fn, torch.int8)}
    assert stored == {n for n, p in plain.named_parameters() if p.dim() == 2}
    for name, value in plain.named_parameters():
        if name not in stored:
            assert torch.equal(views[name], value), f"{name} must be untouched"
    inputs = dit_inputs(dim, heads, torch.float32)
    with torch.no_grad():
        exact, found = plain(*inputs()), module(*inputs())
        last, found_last = plain.forward_last(*inputs()), module.forward_last(*inputs())
    for a, b in zip((*found, found_last), (*exact, last), strict=True):
        assert 1e-4 < largest_error(a, b) < bound


def layer_output(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(hidden.shape[1])[None, None].expand(3, 1, -1)
    rotation = modeling.Qwen2_5_VLRotaryEmbedding(LAYER)(hidden, positions)
    with torch.no_grad():
        return layer(hidden, attention_mask=None, position_embeddings=rotation)


@pytest.mark.parametrize("weight_format", ["fp8", "int8"])
def test_M24_an_encoder_layer_of_8_bit_weights_points_the_same_way_as_bf16(weight_format: str) -> None:
    plain, module, _ = build(BLOCKS["encoder"], weight_format, torch.bfloat16)
    hidden = torch.randn(1, 17, LAYER.hidden_size).bfloat16()
    exact, found = layer_output(plain, hidden), layer_output(module, hidden)
    assert found.dtype == torch.bfloat16 and not torch.equal(found, exact)
    added = (found - hidden).float(), (exact - hidden).float()
    assert F.cosine_similarity(found.float(), exact.float(), dim=-1).min() > 0.99
    assert F.cosine_similarity(*added, dim=-1).min() > 0.99, "the residual stream must not hide what the layer adds"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (on_meta(BLOCKS["dit"], torch.float32), ("int4",), "weight format must be one of"),
        (on_meta(BLOCKS["dit"], torch.float32), ("int8", ("txt_mlp.net.3.weight",)), "kept names must be matrices"),
        (nn.Sequential(nn.Linear(4, 4)), ("int8",), "block must be on the meta device"),
        (on_meta(lambda: nn.Sequential(nn.Embedding(4, 4)), torch.float32), ("fp8",), "must belong to a linear layer"),
    ],
)
def test_a_block_that_cannot_be_quantised_is_refused(module: nn.Module, arguments, message: str) -> None:
    before = list(module.modules())
    with pytest.raises(RequestError, match=message):
        quantise_module(module, *arguments)
    assert list(module.modules()) == before
