"""The Z-Image transformer against diffusers, and every exact saving against the naive path."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qengine.engine.latents import pack, unpack
from qengine.engine.mover import Placement
from qengine.engine.stack import Hold
from qengine.engine.zimage import ZImageTransformer
from qengine.engine.zimage.block import ZImageBlock
from qengine.engine.zimage.config import ZImageConfig
from qengine.errors import CheckpointError, RequestError
from qengine.loaders.zimage.shapes import transformer_shapes
from zpipelines import TRANSFORMER, open_zimage, reference_zimage, shared_zimage

CPU = torch.device("cpu")
RELEASED = TRANSFORMER | {
    "dim": 3840,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}


def load(hold: Hold | None = None, cache: Path | None = None, dtype: torch.dtype = torch.float32) -> ZImageTransformer:
    component = open_zimage(shared_zimage()).transformer
    return ZImageTransformer.load(component, device=CPU, dtype=dtype, cache=cache, hold=hold)


@functools.cache
def shared() -> ZImageTransformer:
    return load()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(
    model: ZImageTransformer, latents: torch.Tensor, prompts: list[torch.Tensor], t: float, **options: Any
) -> list[torch.Tensor]:
    """Velocities as [z, 1, h, w], from latents [1, z, 1, h, w]."""
    rows, columns = (side // 2 for side in latents.shape[-2:])
    contexts = model.contexts(prompts, rows, columns)
    found = model.velocity(pack(latents), contexts, model.table([t]), t, **options)
    return [unpack(tokens, rows, columns)[0] for tokens in found]


@torch.no_grad()
def run_reference(latents: torch.Tensor, prompt: torch.Tensor, t: float) -> torch.Tensor:
    return -reference_zimage().transformer([latents[0]], torch.tensor([t]), [prompt], return_dict=False)[0][0]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (2, 2), (10, 6), (4, 48), (16, 20)])
@pytest.mark.parametrize("lengths", [(7, 40), (32,), (64, 1), (31, 33)])
def test_one_forward_equals_diffusers(height: int, width: int, lengths: tuple[int, ...]) -> None:
    latents = noise(1, 16, 1, height, width)
    prompts = [noise(length, 48, seed=length) for length in lengths]
    for prompt, velocity in zip(prompts, run(shared(), latents, prompts, 0.371), strict=True):
        expected = run_reference(latents, prompt, 0.371)
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_a_caption_may_be_as_long_as_the_positions_reach_and_no_longer() -> None:
    model, latents = shared(), noise(1, 16, 1, 4, 4)
    assert model.config.caption_limit == 224
    longest = noise(224, 48, seed=3)
    expected = run_reference(latents, longest, 0.5)
    torch.testing.assert_close(run(model, latents, [longest], 0.5)[0], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(IndexError):
        run_reference(latents, noise(225, 48), 0.5)
    with pytest.raises(RequestError, match="caption must be 1 to 224 tokens, got 225"):
        run(model, latents, [noise(225, 48)], 0.5)
    with pytest.raises(RequestError, match="got 0"):
        run(model, latents, [noise(0, 48)], 0.5)
    assert ZImageConfig.from_dict(RELEASED).caption_limit == 1504


def test_S24_prompt_embeddings_of_another_width_and_pictures_beyond_the_positions_are_refused() -> None:
    with pytest.raises(RequestError, match=r"shape \[tokens, 48\], got \[5, 64\]"):
        run(shared(), noise(1, 16, 1, 4, 4), [noise(5, 64)], 0.5)
    with pytest.raises(RequestError, match="at most 64x64 image tokens, got 65x2"):
        shared().contexts([noise(5, 48)], 2, 65)


def test_zeroing_any_one_tensor_changes_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    component = open_zimage(shared_zimage()).transformer
    checkpoint = component.checkpoint
    read, read_into, zeroed = checkpoint.read, checkpoint.read_into, ""

    def into(items: Any) -> None:
        read_into(items)
        for name, tensor in items:
            if name == zeroed:
                tensor.data.zero_()

    def alone(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return read(name, dtype) * (name != zeroed)

    monkeypatch.setattr(checkpoint, "read_into", into)
    monkeypatch.setattr(checkpoint, "read", alone)
    latents, prompt = noise(1, 16, 1, 6, 6), noise(5, 48)

    def velocity() -> torch.Tensor:
        model = ZImageTransformer.load(component, device=CPU, dtype=torch.float32, cache=None)
        return run(model, latents, [prompt], 0.6)[0]

    baseline, names = velocity(), list(checkpoint.tensors)
    assert set(names) == set(transformer_shapes(component.config)) and len(names) > 100
    for zeroed in names:
        assert (velocity() - baseline).abs().max() > 1e-4, zeroed


PLACEMENTS = (
    Placement(5, (0, 2, 4), slots=1),
    Placement(5, (0, 1, 2, 3, 4), slots=2, host="disk"),
    Placement(5, (1, 3), slots=3),
)


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "fp8"])
def test_where_the_blocks_lie_never_changes_a_bit(weight_format: str, tmp_path: Path) -> None:
    latents, prompts = noise(1, 16, 1, 6, 10), [noise(40, 48), noise(3, 48)]
    resident = load(Hold(weight_format), tmp_path)
    expected = [run(resident, latents, prompts, t) for t in (0.2, 0.9)]
    assert not torch.equal(expected[0][0], run(shared(), latents, prompts, 0.2)[0]) or weight_format == "bf16"
    for placement in PLACEMENTS:
        model = load(Hold(weight_format, placement), tmp_path)
        for t, wanted in zip((0.2, 0.9), expected, strict=True):
            found = run(model, latents, prompts, t, more=t == 0.2)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        model.close()


def test_X05_captions_are_refined_once_and_their_weights_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    latents, prompts = noise(1, 16, 1, 6, 6), [noise(9, 48), noise(41, 48)]
    contexts = model.contexts(prompts, 3, 3)
    table = model.table([0.3, 0.8])
    reads: list[str] = []
    checkpoint = model.captions._checkpoint
    monkeypatch.setattr(checkpoint, "read_into", lambda items: reads.extend(name for name, _ in items))
    for t in (0.3, 0.8):
        with torch.no_grad():
            found = model.velocity(pack(latents), contexts, table, t)
        for prompt, velocity in zip(prompts, found, strict=True):
            ours = unpack(velocity, 3, 3)[0]
            torch.testing.assert_close(ours, run_reference(latents, prompt, t), atol=1e-5, rtol=1e-5)
    assert torch.equal(model.contexts([prompts[1].clone()], 4, 4)[0].caption, contexts[1].caption)
    assert model.captions.runs == 1 and not reads
    monkeypatch.undo()
    model.contexts([noise(9, 48, seed=5)], 3, 3)
    assert model.captions.runs == 2


def test_X05_all_prompts_run_inside_one_visit_and_share_the_noise_refiner(monkeypatch: pytest.MonkeyPatch) -> None:
    model, latents = load(), noise(1, 16, 1, 6, 6)
    prompts = [noise(9, 48), noise(20, 48, seed=2), noise(50, 48, seed=3)]
    calls: list[tuple[int, int | None]] = []
    forward = ZImageBlock.forward

    def counted(self: ZImageBlock, x: torch.Tensor, rows: Any, turns: Any, keep: Any, kernels: Any) -> torch.Tensor:
        calls.append((x.shape[1], keep))
        return forward(self, x, rows, turns, keep, kernels)

    model.contexts(prompts, 3, 3)
    monkeypatch.setattr(ZImageBlock, "forward", counted)
    before = model.blocks.visits
    together = run(model, latents, prompts, 0.4)
    assert model.blocks.visits - before == model.config.visits == 5
    joint = [(64, None), (64, None), (96, None)]
    assert calls == [(32, None)] * 4 + joint * 2 + [(64, 9), (64, 9), (96, 9)]
    monkeypatch.undo()
    for prompt, velocity in zip(prompts, together, strict=True):
        assert torch.equal(run(model, latents, [prompt], 0.4)[0], velocity)


def test_X05_modulation_rows_equal_the_modulation_layers() -> None:
    stock, table = reference_zimage().transformer, shared().table([0.9, 0.25])
    with torch.no_grad():
        embedding = stock.t_embedder(torch.tensor([0.25]) * 1000)
        for index, layer in ((1, stock.noise_refiner[1]), (4, stock.layers[2])):
            scale, gate, ffn_scale, ffn_gate = layer.adaLN_modulation(embedding)[0].chunk(4)
            expected = (1 + scale, gate.tanh(), 1 + ffn_scale, ffn_gate.tanh())
            torch.testing.assert_close(tuple(table.block(index, 0.25)), expected, atol=1e-5, rtol=1e-5)
        final = 1 + stock.all_final_layer["2-1"].adaLN_modulation(embedding)[0]
    torch.testing.assert_close(table.output(0.25), final, atol=1e-5, rtol=1e-5)
    assert torch.equal(shared().table([0.25]).output(0.25), table.output(0.25))


def test_modulation_and_caption_weights_take_no_memory() -> None:
    shapes = transformer_shapes(TRANSFORMER)
    rest = {name for name in shapes if "adaLN" in name or name.startswith(("t_embedder", "cap_", "context_refiner"))}
    held = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in rest)
    model = shared()
    assert 4 * held <= model.nbytes < 4 * held + 5 * (4096 + 13 * 256)
    assert model.blocks.nbytes > 0.9 * 4 * held


def test_the_released_sizes_add_up() -> None:
    shapes = transformer_shapes(RELEASED)
    size = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert sum(size.values()) == 6_154_908_736
    assert sum(count for name, count in size.items() if name.startswith("layers.7.")) == 180_910_336
    refiner = sum(count for name, count in size.items() if name.startswith("context_refiner.1."))
    assert refiner == 176_962_816
    modulation = sum(count for name, count in size.items() if "adaLN" in name and "final" not in name)
    assert modulation == 32 * 3_947_520


def test_the_definitions_and_bfloat16_stay_near_float32() -> None:
    latents, prompts = noise(1, 16, 1, 8, 8), [noise(11, 48)]
    exact = run(shared(), latents, prompts, 0.45)[0]
    torch.testing.assert_close(run(shared(), latents, prompts, 0.45, safe=True)[0], exact, atol=1e-5, rtol=1e-5)
    stock = reference_zimage().transformer
    half = type(stock).from_pretrained(shared_zimage() / "transformer", torch_dtype=torch.bfloat16).eval()
    with torch.no_grad():
        inputs = [latents[0].bfloat16()], torch.tensor([0.45]), [prompts[0].bfloat16()]
        allowed = -half(*inputs, return_dict=False)[0][0]
    ours = run(load(dtype=torch.bfloat16), latents, prompts, 0.45)[0]
    assert ours.dtype == torch.bfloat16
    error, most = (F.mse_loss(value.float(), exact).sqrt() for value in (ours, allowed))
    assert 0 < error <= 2 * most


def test_a_check_that_raises_stops_before_a_block() -> None:
    seen: list[None] = []

    def check() -> None:
        seen.append(None)
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(shared(), noise(1, 16, 1, 4, 4), [noise(5, 48)], 0.5, check=check)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"all_patch_size": [4]}, r"all_patch_size=\[2\], got \[4\]"),
        ({"qk_norm": False}, "qk_norm=True, got False"),
        ({"siglip_feat_dim": 1152}, "Omni"),
        ({"n_kv_heads": 2}, r"n_kv_heads=4 \(n_heads\), got 2"),
        ({"axes_dims": [4, 4, 4]}, "add up to the head size 16"),
        ({"dim": 65}, "multiple of n_heads 4, got 65"),
        ({"rope_theta": None}, "must name rope_theta"),
    ],
)
def test_a_model_that_is_not_run_is_refused(change: dict[str, Any], words: str) -> None:
    config = {key: value for key, value in (TRANSFORMER | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=words):
        ZImageConfig.from_dict(config)
