"""Reference methods, strengths, masks and schedules on small random transformers, with and without zero_cond_t."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import QwenImageTransformer2DModel
from pipelines import shared_pipeline
from qengine.engine.dit import Branch, QwenImageTransformer, block, emphasis
from qengine.engine.latents import pack, unpack
from qengine.engine.reference.apply import References, Sight
from qengine.engine.reference.options import Reference
from qengine.kernels.attention import attend_weighted
from qengine.loaders import open_model

TARGET, GRIDS = (5, 7), [(3, 4), (6, 5)]
SIGMA = 0.6
PROMPT = torch.randn(6, 64, generator=torch.Generator().manual_seed(9))

models = pytest.mark.parametrize("kind", ["edit-2509", "edit-2511"])


@cache
def model_of(kind: str) -> QwenImageTransformer:
    component = open_model(shared_pipeline(kind)).transformer
    return QwenImageTransformer.load(component, device=torch.device("cpu"), dtype=torch.float32, cache=None)


def tokens(grid: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(1, grid[0] * grid[1], 64, generator=torch.Generator().manual_seed(seed))


X = tokens(TARGET, 0)
PICTURES = [tokens(grid, k + 1) for k, grid in enumerate(GRIDS)]


def references(*pictures: torch.Tensor, steps: int = 1, shares: Any = None, grids: Any = None, **options: Any):
    """References of one picture or several, of grids ``GRIDS`` unless told otherwise."""
    made, pictures = Reference(**options), pictures or (PICTURES[0],)
    shares = shares or [None] * len(pictures)
    sights = [Sight(*each) for each in zip(pictures, grids or GRIDS, shares, strict=False)]
    return References(made, made.table(steps, len(pictures)), tuple(sights), TARGET)


@torch.no_grad()
def velocity(kind: str, given: References, index: int = 0, x: torch.Tensor = X, prompts: int = 1) -> list[torch.Tensor]:
    model, step = model_of(kind), given.at(index, x, SIGMA)
    grids, frames, kept = given.layout(given.table[index].present)
    branches = [model.branch(PROMPT, grids, frames=frames, kept=kept)]
    if prompts > 1:
        branches.append(model.branch(PROMPT[:3], grids if given.options.negative else [TARGET]))
    dressed = step.dress(branches, given.options, torch.float32)
    return model.velocity(step.latents, step.tokens, dressed, model.table([SIGMA]), SIGMA)


@torch.no_grad()
def plain(kind: str, *pictures: torch.Tensor, prompt: torch.Tensor = PROMPT) -> torch.Tensor:
    """The network as it is called without any option."""
    model = model_of(kind)
    branch = model.branch(prompt, [TARGET, *GRIDS[: len(pictures)]])
    seen = torch.cat(pictures, dim=1) if pictures else None
    return model.velocity(X, seen, [branch], model.table([SIGMA]), SIGMA)[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm())


@models
@pytest.mark.parametrize("method", ["default", "concat", "cross_attn"])
def test_R02_R09_strength_1_is_the_stock_edit_to_the_bit_and_diffusers_within_float32(kind: str, method: str) -> None:
    for pictures in (PICTURES[:1], PICTURES):
        given = references(*pictures, method=method)
        assert given.at(0, X, SIGMA).emphasis is None
        found = velocity(kind, given)[0]
        assert torch.equal(found, plain(kind, *pictures))
        stock = QwenImageTransformer2DModel.from_pretrained(shared_pipeline(kind) / "transformer").eval()
        shapes = [[(1, *grid) for grid in (TARGET, *GRIDS[: len(pictures)])]]
        with torch.no_grad():
            joint = torch.cat([X, *pictures], dim=1)
            out = stock(joint, PROMPT[None], None, torch.tensor([SIGMA]), shapes, return_dict=False)[0]
        torch.testing.assert_close(found, out[:, : X.shape[1]], atol=1e-5, rtol=1e-5)


@models
@pytest.mark.parametrize("method", ["default", "inject", "concat", "cross_attn"])
def test_R08_strength_0_is_text_to_image_to_the_bit_whatever_the_picture(kind: str, method: str) -> None:
    for picture in (PICTURES[0], torch.full_like(PICTURES[0], 3.0)):
        assert torch.equal(velocity(kind, references(picture, method=method, strength=0.0))[0], plain(kind))


@models
def test_R10_the_distance_to_text_to_image_rises_with_the_strength_and_starts_at_0(kind: str) -> None:
    away, strengths = plain(kind), (1e-6, 0.1, 0.3, 0.5, 0.7, 0.9, 1, 1.3, 2)
    small = (3, 4)
    found = [distance(velocity(kind, references(strength=s, grids=[small]))[0], away) for s in strengths]
    assert found == sorted(found) and len(set(found)) == len(found)
    assert found[0] < 1e-3 < found[1]


@models
def test_R11_strength_2_is_finite_for_every_method(kind: str) -> None:
    for method in ("default", "inject", "concat", "cross_attn"):
        made = velocity(kind, references(method=method, strength=2.0))[0]
        assert torch.isfinite(made).all() and distance(made, plain(kind, PICTURES[0])) > 1e-2


def test_R10_R11_the_attention_mass_of_the_references_rises_with_the_strength() -> None:
    generator = torch.Generator().manual_seed(3)
    query, keys = (torch.randn(1, n, 4, 16, generator=generator).double() for n in (9, 20))
    on_reference = torch.zeros_like(keys)
    on_reference[:, 12:] = 1
    strengths = (0.1, 0.5, 1.0, 1.5, 2.0)
    native = attend_weighted(query, keys, on_reference, [(12, 0.0), (8, 0.0)])
    masses = [attend_weighted(query, keys, on_reference, [(12, 0.0), (8, math.log(s))]) for s in strengths]
    for strength, mass in zip(strengths, masses, strict=True):
        torch.testing.assert_close(mass, strength * native / (strength * native + 1 - native), atol=1e-12, rtol=0)
    assert all((more > less).all() for less, more in zip(masses, masses[1:], strict=False))


def test_R04_concat_puts_s_r_after_the_target() -> None:
    given = references(*PICTURES, method="concat", strength=(0.6, 1.7)).at(0, X, SIGMA)
    assert given.tokens is not None and given.emphasis is None and given.latents is X
    assert torch.equal(given.tokens, torch.cat([PICTURES[0] * 0.6, PICTURES[1] * 1.7], dim=1))
    latent = references(*PICTURES, mode="latent", strength=(0.6, 1.7)).at(0, X, SIGMA)
    assert latent.tokens is not None and torch.equal(latent.tokens, given.tokens) and latent.emphasis is None


@models
def test_R05_cross_attn_scales_the_keys_after_their_norm_and_no_value(kind: str, monkeypatch) -> None:
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {"native": [], "scaled": [], "of references": []}
    native, weighted = block.attend, emphasis.attend_weighted

    def note(name: str, function):
        def attend(query, keys, values, *rest, **how):
            seen[name].append((query.clone(), keys.clone(), values.clone()))
            return function(query, keys, values, *rest, **how)

        return attend

    monkeypatch.setattr(block, "attend", note("native", native))
    monkeypatch.setattr(emphasis, "attend", note("of references", native))
    monkeypatch.setattr(emphasis, "attend_weighted", note("scaled", weighted))
    velocity(kind, references())
    velocity(kind, references(method="cross_attn", strength=0.7))
    count = PICTURES[0].shape[1]
    (query, keys, values), (leading, scaled, same) = seen["native"][0], seen["scaled"][0]
    assert torch.equal(scaled[:, -count:], keys[:, -count:] * 0.7) and torch.equal(scaled[:, :-count], keys[:, :-count])
    assert torch.equal(values, same) and torch.equal(leading, query[:, :-count])
    rows, untouched, _ = seen["of references"][0]
    assert torch.equal(untouched, keys) and torch.equal(rows, query[:, -count:])
    assert len(seen["scaled"]) == model_of(kind).config.num_layers


def test_R05_by_the_rule_gain_cross_attn_is_default() -> None:
    one = velocity("edit-2511", references(method="cross_attn", cross_attn_rule="gain", strength=0.4))[0]
    assert torch.equal(one, velocity("edit-2511", references(strength=0.4))[0])


def test_R03_inject_adds_s_times_1_minus_sigma_times_the_picture_to_what_the_network_reads() -> None:
    given = references(method="inject", strength=0.8, steps=4)
    planes = F.interpolate(unpack(PICTURES[0], *GRIDS[0])[:, :, 0], (10, 14), mode="bilinear", align_corners=False)
    resized = pack(planes[:, :, None])
    for index, sigma in enumerate((1.0, 0.7, 0.3, 0.02)):
        made = given.at(index, X, sigma)
        torch.testing.assert_close(made.latents, X + 0.8 * (1 - sigma) * resized, atol=1e-6, rtol=1e-6)
        assert made.state is X and (sigma < 1 or made.latents is X)
    same = Sight(X + 1, TARGET)
    made = References(given.options, given.table, (same,), TARGET).at(2, X, 0.5)
    assert torch.equal(made.latents, X + 0.8 * 0.5 * (X + 1))


def test_R03_inject_without_gain_is_default_and_into_the_state_it_stays_there() -> None:
    none = references(method="inject", strength=0.8, inject_gain=0.0)
    assert torch.equal(velocity("edit-2511", none)[0], velocity("edit-2511", references(strength=0.8))[0])
    made = references(method="inject", strength=0.8, inject_into="state").at(0, X, SIGMA)
    assert made.state is made.latents and distance(made.state, X) > 1


@models
@pytest.mark.parametrize("method", ["default", "inject", "concat", "cross_attn"])
def test_R16_what_lies_under_a_hard_mask_is_not_seen_and_a_white_one_is_none(kind: str, method: str) -> None:
    count = PICTURES[0].shape[1]
    half = (torch.arange(count) % 2 == 0).float()
    poisoned = torch.where(half[:, None] > 0, PICTURES[0], torch.tensor(50.0))
    options: dict[str, Any] = {"method": method, "strength": 0.7}
    first = velocity(kind, references(shares=[half], **options))[0]
    assert torch.equal(first, velocity(kind, references(poisoned, shares=[half], **options))[0])
    assert distance(first, velocity(kind, references(**options))[0]) > 1e-3
    white = velocity(kind, references(shares=[torch.ones(count)], **options))[0]
    assert torch.equal(white, velocity(kind, references(**options))[0])


@models
def test_R16_the_tokens_beside_a_hard_mask_keep_their_positions(kind: str) -> None:
    half = (torch.arange(12) >= 6).float()
    masked = velocity(kind, references(shares=[half]))[0]
    gone = references(strength=1.0).at(0, X, SIGMA)
    weights = emphasis.Emphasis((emphasis.Run(6, -1e9), emphasis.Run(6)))
    model = model_of(kind)
    with torch.no_grad():
        branch = model.branch(PROMPT, [TARGET, GRIDS[0]])
        silenced = Branch(branch.text, branch.rotations, weights)
        hidden = model.velocity(X, gone.tokens, [silenced], model.table([SIGMA]), SIGMA)[0]
    # the references still read the silenced tokens, so the two agree in the first block alone
    assert distance(masked, hidden) < 0.5 * distance(masked, plain(kind, PICTURES[0]))


def test_R16_a_soft_mask_is_a_gain_of_its_logarithm_or_a_factor() -> None:
    shares = torch.linspace(0.25, 1, 12)
    for method, mode in (("default", "gain"), ("cross_attn", "gain")):
        made = references(method=method, mode=mode, shares=[shares]).at(0, X, SIGMA)
        assert made.emphasis is not None and torch.equal(made.emphasis.runs[0].gain, shares.log())  # pyright: ignore[reportArgumentType]
        assert made.tokens is not None and torch.equal(made.tokens, PICTURES[0])
    for method in ("concat", "inject"):
        made = references(method=method, shares=[shares]).at(0, X, SIGMA)
        assert made.tokens is not None and torch.equal(made.tokens, PICTURES[0] * shares[:, None])
    uniform = velocity("edit-2511", references(shares=[torch.full((12,), 0.5)]))[0]
    torch.testing.assert_close(uniform, velocity("edit-2511", references(strength=0.5))[0], atol=1e-5, rtol=1e-5)


def test_R14_a_list_of_one_strength_is_that_strength() -> None:
    listed, one = references(strength="0.7,0.7,0.7", steps=3), references(strength=0.7, steps=3)
    for index in range(3):
        assert torch.equal(velocity("edit-2511", listed, index)[0], velocity("edit-2511", one, index)[0])


def test_R14_a_rising_schedule_is_its_strength_in_each_step_and_text_to_image_where_it_is_0() -> None:
    rising = references(strength="0:1", steps=3)
    for index, strength in enumerate((0.0, 0.5, 1.0)):
        expected = velocity("edit-2511", references(strength=strength))[0]
        assert torch.equal(velocity("edit-2511", rising, index)[0], expected)


@models
def test_R22_a_picture_of_strength_0_is_as_if_it_were_not_given(kind: str) -> None:
    both = references(*PICTURES, strength=(0.8, 0.0))
    assert torch.equal(velocity(kind, both)[0], velocity(kind, references(strength=0.8))[0])
    second = references(*PICTURES, strength=(0.0, 1.0))
    alone = velocity(kind, references(PICTURES[1], grids=GRIDS[1:]))[0]
    assert torch.equal(velocity(kind, second)[0], alone)
    framed = velocity(kind, references(*PICTURES, strength=(0.0, 1.0), keep_frame_index=True))[0]
    assert distance(framed, alone) > 1e-4


@models
def test_R22_pictures_have_strengths_of_their_own_and_an_order(kind: str) -> None:
    grid = (3, 4)
    one, two = tokens(grid, 1), tokens(grid, 2)
    made = [
        velocity(kind, references(*pictures, strength=strengths, grids=[grid, grid]))[0]
        for pictures in ((one, two), (two, one))
        for strengths in ((0.5, 1.5), (1.5, 0.5), (1.0, 1.0))
    ]
    assert all(distance(a, b) > 1e-3 for i, a in enumerate(made) for b in made[:i])


@models
@pytest.mark.parametrize("method", ["default", "inject"])
def test_the_negative_branch_can_be_without_references(kind: str, method: str) -> None:
    first, second = velocity(kind, references(method=method, strength=0.7, negative=False), prompts=2)
    assert torch.equal(second, plain(kind, prompt=PROMPT[:3]))
    assert torch.equal(first, velocity(kind, references(method=method, strength=0.7))[0])
