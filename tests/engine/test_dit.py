"""The transformer against diffusers, and every exact saving against the naive path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from pipelines import shared_pipeline
from qengine.engine.dit import DiTConfig, ModulationRows, QwenImageTransformer
from qengine.engine.stack import Hold
from qengine.errors import CheckpointError, KernelError
from qengine.loaders import Checkpoint, Component, open_model
from qengine.loaders.shapes import transformer_shapes

from tests.kernels.counting import counted

CPU = torch.device("cpu")
GRIDS = [(5, 7), (3, 4), (6, 5)]


def reference(kind: str) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel.from_pretrained(shared_pipeline(kind) / "transformer").eval()


def ours(kind: str, cache: Path | None = None) -> QwenImageTransformer:
    component = open_model(shared_pipeline(kind)).transformer
    return QwenImageTransformer.load(component, device=CPU, dtype=torch.float32, cache=cache)


def tokens_of(grids, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, rows * columns, channels, generator=generator) for rows, columns in grids]


def embeds(config: DiTConfig, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(length, config.joint_attention_dim, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: QwenImageTransformer, grids, prompts, timestep: float, **how) -> list[torch.Tensor]:
    target, *rest = tokens_of(grids, model.config.in_channels)
    references = torch.cat(rest, dim=1) if rest else None
    branches = [model.branch(prompt, grids) for prompt in prompts]
    return model.velocity(target, references, branches, model.table([timestep]), timestep, **how)


@torch.no_grad()
def run_reference(model: QwenImageTransformer2DModel, grids, prompt, timestep: float) -> torch.Tensor:
    tokens = torch.cat(tokens_of(grids, model.config.in_channels), dim=1)
    shapes = [[(1, *grid) for grid in grids]]
    out = model(tokens, prompt[None], None, torch.tensor([timestep]), shapes, return_dict=False)[0]
    return out[:, : grids[0][0] * grids[0][1]]


@pytest.mark.parametrize("kind", ["qwen-image", "edit-2509", "edit-2511"])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_one_forward_equals_diffusers(kind: str, references: int) -> None:
    model = ours(kind)
    grids = GRIDS[: 1 + references]
    prompts = [embeds(model.config, 9), embeds(model.config, 4, seed=2)]
    found = run(model, grids, prompts, 0.4371)
    for prompt, velocity in zip(prompts, found, strict=True):
        expected = run_reference(reference(kind), grids, prompt, 0.4371)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_M04_four_references_of_four_sizes_equal_diffusers() -> None:
    model = ours("edit-2509")
    grids = [(4, 4), (2, 3), (5, 2), (3, 3), (1, 6)]
    prompt = embeds(model.config, 5)
    expected = run_reference(reference("edit-2509"), grids, prompt, 0.9)
    torch.testing.assert_close(run(model, grids, [prompt], 0.9)[0], expected, atol=1e-5, rtol=1e-5)


def test_E01_zero_cond_t_changes_the_output_only_with_references() -> None:
    component = open_model(shared_pipeline("edit-2511")).transformer
    plain = Component(component.name, {**component.config, "zero_cond_t": False}, component.checkpoint)
    flagged = ours("edit-2511")
    unflagged = QwenImageTransformer.load(plain, device=CPU, dtype=torch.float32, cache=None)
    prompt = embeds(flagged.config, 6)
    alone = [run(model, GRIDS[:1], [prompt], 0.7)[0] for model in (flagged, unflagged)]
    assert torch.equal(*alone)
    with_reference = [run(model, GRIDS, [prompt], 0.7)[0] for model in (flagged, unflagged)]
    assert (with_reference[0] - with_reference[1]).abs().max() > 1e-2


def test_order_of_references_matters() -> None:
    model = ours("edit-2511")
    prompt = embeds(model.config, 6)
    target, first, second = tokens_of([(4, 4), (3, 3), (3, 3)], model.config.in_channels)
    grids = [(4, 4), (3, 3), (3, 3)]
    with torch.no_grad():
        branch, table = model.branch(prompt, grids), model.table([0.5])
        one = model.velocity(target, torch.cat([first, second], 1), [branch], table, 0.5)[0]
        two = model.velocity(target, torch.cat([second, first], 1), [branch], table, 0.5)[0]
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["edit-2511", "qwen-image"])
def test_zeroing_any_one_tensor_changes_the_output(kind: str) -> None:
    component = open_model(shared_pipeline(kind)).transformer
    config = DiTConfig.from_dict(component.config)
    names = transformer_shapes(component.config)
    dead = {name for name in names if _is_dead(name, config)}
    baseline = run(ours(kind), GRIDS[:2] if kind != "qwen-image" else GRIDS[:1], [embeds(config, 6)], 0.6)[0]
    for name in names:
        model = QwenImageTransformer.load(
            Component(component.name, component.config, _Zeroed(component.checkpoint, name)),
            device=CPU,
            dtype=torch.float32,
            cache=None,
        )
        changed = run(model, GRIDS[:2] if kind != "qwen-image" else GRIDS[:1], [embeds(config, 6)], 0.6)[0]
        difference = (changed - baseline).abs().max()
        assert (difference == 0) if name in dead else (difference > 1e-4), f"{name}: {difference}"


def _is_dead(name: str, config: DiTConfig) -> bool:
    prefix = f"transformer_blocks.{config.num_layers - 1}."
    return name.startswith(prefix) and name.removeprefix(prefix).startswith(
        ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    )


class _Zeroed:
    """A checkpoint in which one tensor reads as zeros."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self.identity = checkpoint.identity + name

    def require(self, *args, **kwargs) -> None:
        self._checkpoint.require(*args, **kwargs)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._checkpoint.read(name, dtype)
        return torch.zeros_like(tensor) if name == self._name else tensor

    def read_into(self, items) -> None:
        self._checkpoint.read_into(items)
        for name, tensor in items:
            if name == self._name:
                tensor.data.zero_()


def test_the_plans_kernels_reach_the_blocks_and_a_safe_step_takes_the_definitions(monkeypatch) -> None:
    pytest.importorskip("triton")
    from qengine.kernels.attention import reference as attention
    from qengine.kernels.rope import triton as rope

    component = open_model(shared_pipeline("edit-2511")).transformer
    hold = Hold(kernels={"rope": "triton", "modulate": "triton", "attention": "sdpa", "linear": "torch"})
    model = QwenImageTransformer.load(component, device=CPU, dtype=torch.float32, cache=None, hold=hold)
    turned = counted(monkeypatch, rope, "_norm_rope_kernel")
    attended = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *arguments: attended.append(1) or attend(*arguments))
    prompt = embeds(model.config, 4)
    expected = run(ours("edit-2511"), GRIDS[:2], [prompt], 0.5)[0]
    torch.testing.assert_close(run(model, GRIDS[:2], [prompt], 0.5)[0], expected, atol=1e-5, rtol=1e-5)
    layers = model.config.num_layers
    assert turned.launches == 4 * (layers - 1) + 3 and not attended
    torch.testing.assert_close(run(model, GRIDS[:2], [prompt], 0.5, safe=True)[0], expected, atol=1e-5, rtol=1e-5)
    assert turned.launches == 4 * (layers - 1) + 3 and len(attended) == layers


def test_another_template_runs_over_the_same_tape() -> None:
    component = open_model(shared_pipeline("edit-2511")).transformer
    first = ours("edit-2511")
    second = first.with_template(QwenImageTransformer.stack(component, "bf16", torch.float32).template)
    prompt = embeds(first.config, 4)
    found = [run(model, GRIDS[:2], [prompt], 0.5)[0] for model in (first, second, first)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert second.blocks is first.blocks and second._template is not first._template


def test_an_implementation_that_does_not_exist_stops_the_step() -> None:
    component = open_model(shared_pipeline("edit-2511")).transformer
    for kernels in ({"rope": "cuda"}, {"modulate": "cuda"}, {"attention": "cuda"}):
        hold = Hold(kernels=kernels)
        model = QwenImageTransformer.load(component, device=CPU, dtype=torch.float32, cache=None, hold=hold)
        with pytest.raises(KernelError, match="got 'cuda'"):
            run(model, GRIDS[:1], [embeds(model.config, 4)], 0.5)


def test_X05_both_branches_run_inside_one_visit_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours("edit-2511")
    visits = []
    bind = model._template.bind
    monkeypatch.setattr(model._template, "bind", lambda views: visits.append(views) or bind(views))
    prompts = [embeds(model.config, 9), embeds(model.config, 4, seed=2)]
    both = run(model, GRIDS, prompts, 0.5)
    assert len([views for views in visits if views]) == model.config.num_layers
    for prompt, velocity in zip(prompts, both, strict=True):
        assert torch.equal(run(model, GRIDS, [prompt], 0.5)[0], velocity)


def test_X05_modulation_rows_equal_the_modulation_layers() -> None:
    stock = reference("edit-2511")
    model = ours("edit-2511")
    rows = model.table([0.9, 0.25]).block(1, 0.25, zero_cond_t=True)
    with torch.no_grad():
        temb = stock.time_text_embed(torch.tensor([0.25, 0.0]), torch.zeros(1))
        block = stock.transformer_blocks[1]
        image, text = block.img_mod(temb), block.txt_mod(temb)
        scale, shift = stock.norm_out.linear(F.silu(temb[:1])).chunk(2, dim=1)
    torch.testing.assert_close(rows.image, image[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.reference, image[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.text, text[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.table([0.25]).output(0.25), (scale[0], shift[0]), atol=1e-5, rtol=1e-5)


def test_modulation_weights_take_no_memory() -> None:
    model = ours("edit-2511")
    shapes = transformer_shapes(open_model(shared_pipeline("edit-2511")).transformer.config)
    modulation = sum(torch.Size(s).numel() for name, s in shapes.items() if "_mod." in name)
    stored = sum(torch.Size(s).numel() for s in shapes.values())
    assert model.nbytes < 4 * (stored - modulation) + 4096 * model.config.num_layers + 256 * len(shapes)
    assert modulation > stored / 4


class _Counting:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self.reads = checkpoint, 0

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.reads += 1
        return self._checkpoint.read(name, dtype)


def test_modulation_rows_come_from_the_cache_the_second_time(tmp_path: Path) -> None:
    checkpoint = open_model(shared_pipeline("edit-2511")).transformer.checkpoint
    layers = ours("edit-2511").config.num_layers

    def rows(source: _Counting) -> ModulationRows:
        return ModulationRows(source, layers, checkpoint.identity, device=CPU, cache=tmp_path)

    first, second, third = (_Counting(checkpoint) for _ in range(3))
    made = rows(first).table([0.5, 0.0], dtype=torch.float32)
    recalled = rows(second).table([0.0, 0.5], dtype=torch.float32)
    assert first.reads > 0 and second.reads == 0
    assert torch.equal(made.block(0, 0.5, zero_cond_t=True).image, recalled.block(0, 0.5, zero_cond_t=True).image)
    more = rows(third).table([0.5, 0.75], dtype=torch.float32)
    assert third.reads > 0
    assert torch.equal(more.block(1, 0.5, zero_cond_t=False).text, made.block(1, 0.5, zero_cond_t=False).text)


def test_a_damaged_modulation_cache_is_said_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ours("edit-2511", cache=tmp_path)
    made = model.table([0.5]).output(0.5)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    again = ours("edit-2511", cache=tmp_path).table([0.5]).output(0.5)
    assert "cannot be read" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


def test_a_model_with_unknown_conditioning_is_refused() -> None:
    config = dict(open_model(shared_pipeline("edit-2511")).transformer.config)
    with pytest.raises(CheckpointError, match="guidance_embeds"):
        DiTConfig.from_dict({**config, "guidance_embeds": True})
    with pytest.raises(CheckpointError, match="add up to"):
        DiTConfig.from_dict({**config, "axes_dims_rope": [2, 2, 2]})
    del config["num_layers"]
    with pytest.raises(CheckpointError, match="num_layers"):
        DiTConfig.from_dict(config)


def test_a_block_beyond_the_tape_cannot_read_another_blocks_weights() -> None:
    model = ours("edit-2511")
    *_, (_, views) = model.blocks.sweep(more=False)
    last = model._template.bind(views)
    assert last.txt_mlp.net[2].weight.is_meta
