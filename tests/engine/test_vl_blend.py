"""Every way of blending: the text at alpha 0, the stated statistics at alpha 1, and no row left out unsaid."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from qengine.engine.vl import (
    MAX_CAPTION_ROWS,
    BlendKnobs,
    adain_global,
    blend,
    blend_adain,
    blend_adain_per_dim,
    blend_attention_weighted,
    blend_embeddings,
    blend_interpolate,
    blend_per_token,
    blend_report,
    blend_style_only,
    blend_with_style_delta,
    compress_rows,
    compute_style_delta,
    graduated_alpha,
    resample,
)
from qengine.engine.vl.knobs import BlendMode
from qengine.errors import RequestError

T, S, D = 11, 213, 48
SIMPLE: dict[str, Callable[..., torch.Tensor]] = {
    "linear": lambda e, v, a: blend_embeddings(v, e, a),
    "interpolate": lambda e, v, a: blend_interpolate(v, e, a),
    "interpolate_area": lambda e, v, a: blend_interpolate(v, e, a, how="area"),
    "adain": blend_adain,
    "adain_global": adain_global,
    "adain_per_dim": blend_adain_per_dim,
    "style_only": lambda e, v, a: blend_style_only(v, e, a),
    "per_token": lambda e, v, a: blend_per_token(v, e, a),
    "attention_weighted": lambda e, v, a: blend_attention_weighted(v, e, list(range(len(e))), a),
}


def rows(length: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(length, D, generator=generator, dtype=torch.float64) * scale + seed).to(dtype)


E, V = rows(T, 1, 8.0), rows(S, 2, 3.0)
KNOWN = get_args(BlendMode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", KNOWN)
def test_V22_alpha_0_is_the_text_bit_by_bit(mode: Any, dtype: torch.dtype) -> None:
    text = E.to(dtype)
    more = {"token_weights": list(range(T))} if mode == "attention_weighted" else {}
    made = blend(V.to(dtype), text, BlendKnobs(alpha=0.0, mode=mode), **more)
    assert torch.equal(made, text) and made.dtype == dtype and made.data_ptr() != text.data_ptr()
    if mode in SIMPLE:
        assert torch.equal(SIMPLE[mode](text, V.to(dtype), 0.0), text)


@pytest.mark.parametrize("mode", [*SIMPLE, "blend"])
@pytest.mark.parametrize("alpha", [-0.1, 1.0001, math.nan])
def test_V22_alpha_outside_0_to_1_is_an_error(mode: str, alpha: float) -> None:
    run = SIMPLE.get(mode, lambda e, v, a: blend(v, e, BlendKnobs(alpha=a)))
    with pytest.raises(RequestError, match="must be"):
        run(E, V, alpha)


@pytest.mark.parametrize(
    "mode", ["interpolate", "interpolate_area", "linear", "adain", "adain_global", "adain_per_dim"]
)
def test_V22_the_result_is_linear_in_alpha(mode: str) -> None:
    run = SIMPLE[mode]
    vl = V[:T] if mode == "linear" else V
    first, last = run(E, vl, 0.0), run(E, vl, 1.0)
    for alpha in (0.1, 0.3, 0.75):
        torch.testing.assert_close(run(E, vl, alpha), alpha * last + (1 - alpha) * first, rtol=0, atol=1e-12)


def test_V22_alpha_1_is_the_resampled_picture() -> None:
    assert torch.equal(blend_interpolate(V, E, 1.0), resample(V, T))
    assert torch.equal(blend(V.float(), E.float(), BlendKnobs(alpha=1.0)), resample(V.float(), T))


@pytest.mark.parametrize("length", [T, 3, S])
def test_V23_S01_interpolate_equals_the_formula(length: int) -> None:
    vl = rows(length, 4)
    moved = F.interpolate(vl.T[None], size=T, mode="linear", align_corners=False)[0].T
    for alpha in (0.3, 0.5):
        torch.testing.assert_close(blend_interpolate(vl, E, alpha), alpha * moved + (1 - alpha) * E, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        blend_interpolate(vl.float(), E.float()), (0.3 * moved + 0.7 * E).float(), rtol=1e-6, atol=1e-5
    )


def test_S01_interpolate_is_the_default_with_alpha_03() -> None:
    assert (BlendKnobs().mode, BlendKnobs().alpha) == ("interpolate", 0.3)
    assert torch.equal(blend(V, E), blend_interpolate(V, E, 0.3))


def felt(how: Any, source: int, length: int) -> torch.Tensor:
    vl = rows(source, 3).requires_grad_()
    blend_interpolate(vl, rows(length, 1), 0.5, how=how).sum().backward()
    assert vl.grad is not None
    return vl.grad.abs().sum(dim=1) > 0


@pytest.mark.parametrize(("source", "length"), [(1041, 11), (271, 13), (5, 11), (11, 11)])
def test_S02_in_area_every_row_of_the_picture_is_felt(source: int, length: int) -> None:
    assert bool(felt("area", source, length).all())
    ones = torch.ones(source, D, dtype=torch.float64)
    torch.testing.assert_close(resample(ones, length, "area"), torch.ones(length, D, dtype=torch.float64))


@pytest.mark.parametrize(("source", "length", "count"), [(1041, 11, 21), (271, 13, 25)])
def test_interpolate_reads_only_a_few_rows_and_never_the_sink(source: int, length: int, count: int) -> None:
    used = felt("linear", source, length)
    assert int(used.sum()) == count and not bool(used[0])


def test_S05_linear_truncates_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = blend_embeddings(V, E, 0.3)
    assert caplog.messages == ["linear blending keeps the first 11 of 213 picture rows; interpolate reads on"]
    torch.testing.assert_close(made, 0.3 * V[:T] + 0.7 * E, rtol=0, atol=1e-12)
    changed = V.clone()
    changed[T:] = 1e3
    assert torch.equal(blend_embeddings(changed, E, 0.3), made)
    short = blend_embeddings(V[:4], E, 0.3)
    torch.testing.assert_close(short, 0.3 * V[:4] + 0.7 * E[:4], rtol=0, atol=1e-12)


def test_S05_linear_at_alpha_1_gives_the_picture_whole(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert torch.equal(blend_embeddings(V, E, 1.0), V)
    assert caplog.messages == ["linear blending at alpha 1 gives all 213 picture rows, no text"]


def test_S06_the_two_names_differ_where_the_picture_is_longer_than_the_text() -> None:
    changed = V.clone()
    changed[100:] += 50
    assert not torch.equal(blend_interpolate(changed, E, 0.3), blend_interpolate(V, E, 0.3))
    assert torch.equal(blend_embeddings(changed, E, 0.3), blend_embeddings(V, E, 0.3))
    assert torch.equal(blend_embeddings(V[:T], E, 0.3), blend_interpolate(V[:T], E, 0.3))


def test_V26_per_token_adain_gives_each_row_the_pictures_mean_and_std_and_keeps_its_order() -> None:
    made, moved = blend_adain(E, V, 1.0), resample(V, T)
    torch.testing.assert_close(made.mean(dim=1), moved.mean(dim=1), rtol=0, atol=1e-10)
    torch.testing.assert_close(made.std(dim=1), moved.std(dim=1), rtol=0, atol=1e-10)
    for ours, text in zip(made, E, strict=True):
        assert torch.corrcoef(torch.stack([ours, text]))[0, 1].item() == pytest.approx(1.0, abs=1e-9)


def test_S04_global_adain_gives_the_pictures_mean_and_std_over_all_rows() -> None:
    made = adain_global(E, V, 1.0)
    torch.testing.assert_close(made.mean(), V.mean(), rtol=0, atol=1e-10)
    torch.testing.assert_close(made.std(), V.std(), rtol=0, atol=1e-10)
    assert torch.corrcoef(torch.stack([made.flatten(), E.flatten()]))[0, 1].item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("length", [S, 4])
def test_V27_S03_per_dim_adain_gives_the_columns_of_all_picture_rows(length: int) -> None:
    vl = rows(length, 5, 2.0)
    made = blend_adain_per_dim(E, vl, 1.0)
    assert made.shape == E.shape
    torch.testing.assert_close(made.mean(dim=0), vl.mean(dim=0), rtol=0, atol=1e-9)
    torch.testing.assert_close(made.std(dim=0), vl.std(dim=0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["adain", "adain_global", "adain_per_dim", "interpolate_area", "interpolate"])
def test_V27_rows_beyond_the_texts_length_are_felt(mode: str) -> None:
    changed = V.clone()
    changed[T:] = changed[T:] * 2 + 1
    assert not torch.equal(SIMPLE[mode](E, changed, 0.5), SIMPLE[mode](E, V, 0.5))


@pytest.mark.parametrize("mode", ["adain", "adain_global", "adain_per_dim", "interpolate"])
def test_blending_a_text_with_itself_gives_the_text(mode: str) -> None:
    torch.testing.assert_close(SIMPLE[mode](E, E, 0.6), E, rtol=0, atol=1e-10)


def test_V27_a_single_row_has_no_column_statistics() -> None:
    for text, vl in ((E[:1], V), (E, V[:1])):
        with pytest.raises(RequestError, match="must have at least 2 rows to measure, got 1"):
            blend_adain_per_dim(text, vl, 0.5)


def test_V25_the_delta_has_alpha_times_the_texts_std() -> None:
    delta = compute_style_delta(rows(T, 6), rows(T, 7))
    assert delta.std().item() == pytest.approx(1.0, rel=1e-9)
    for alpha in (0.3, 1.0, 2.0):
        change = blend_with_style_delta(E, delta, alpha) - E
        assert change.std().item() == pytest.approx(alpha * E.std().item(), rel=1e-9)
    plain = compute_style_delta(rows(T, 6), rows(T, 7), normalize=False)
    torch.testing.assert_close(
        blend_with_style_delta(E, plain, 0.5, scale_to_text=False), E + 0.5 * (rows(T, 6) - rows(T, 7))
    )
    assert blend_with_style_delta(E, compute_style_delta(V, rows(90, 3)), -0.5).shape == E.shape


def test_V25_no_difference_leaves_the_text_and_alpha_must_be_a_number() -> None:
    assert torch.equal(blend_with_style_delta(E, compute_style_delta(V, V), 0.3), E)
    with pytest.raises(RequestError, match="alpha must be a finite number"):
        blend_with_style_delta(E, V, math.inf)


def test_style_only_changes_the_last_third_of_the_columns() -> None:
    made = blend_style_only(V, E, 0.4)
    assert torch.equal(made[:, : 2 * D // 3], E[:, : 2 * D // 3])
    assert torch.equal(made[:, 2 * D // 3 :], blend_interpolate(V, E, 0.4)[:, 2 * D // 3 :])
    assert torch.equal(blend_style_only(V, E, 0.4, columns=(0, D)), blend_interpolate(V, E, 0.4))
    with pytest.raises(RequestError, match="columns must be first and end"):
        blend_style_only(V, E, 0.4, columns=(5, D + 1))


def test_V29_alphas_apply_row_by_row() -> None:
    alphas = [0.0, 1.0, 0.25, *[0.5] * (T - 3)]
    made, moved = blend_per_token(V, E, alphas), resample(V, T)
    assert torch.equal(made[0], E[0]) and torch.equal(made[1], moved[1])
    torch.testing.assert_close(made[2], 0.25 * moved[2] + 0.75 * E[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(blend_per_token(V, E, [0.3] * T), blend_interpolate(V, E, 0.3), rtol=0, atol=1e-12)
    assert torch.equal(blend_per_token(V, E, 0.3), blend_per_token(V, E, [0.3] * T))
    assert torch.equal(blend(V, E, BlendKnobs(mode="per_token", alphas=tuple(alphas))), made)
    for wrong in ([0.3] * (T - 1), [*[0.3] * (T - 1), 1.2], [*[0.3] * (T - 1), math.nan]):
        with pytest.raises(RequestError, match=f"alphas must be {T} shares"):
            blend_per_token(V, E, wrong)


def test_V29_curves_rise_from_start_to_end() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(graduated_alpha(5), 0.5 * t)
    torch.testing.assert_close(graduated_alpha(5, 0.1, 0.9, "ease_in"), 0.1 + 0.8 * t**2)
    torch.testing.assert_close(graduated_alpha(5, 0.1, 0.9, "ease_out"), 0.1 + 0.8 * (1 - (1 - t) ** 2))
    made = blend(V, E, BlendKnobs(mode="per_token", alpha=0.6, start_alpha=0.2, curve="ease_in"))
    assert torch.equal(made, blend_per_token(V, E, graduated_alpha(T, 0.2, 0.6, "ease_in")))
    with pytest.raises(RequestError, match="alpha curve must be"):
        graduated_alpha(5, curve="cubic")  # pyright: ignore[reportArgumentType]


def test_heavier_tokens_keep_more_of_the_text() -> None:
    weights = [3.0, 7.0, *[5.0] * (T - 2)]
    made, moved = blend_attention_weighted(V, E, weights, 0.5), resample(V, T)
    for row, share in ((0, 0.5), (1, 0.5 * 0.2), (2, 0.5 * 0.6)):
        torch.testing.assert_close(made[row], share * moved[row] + (1 - share) * E[row], rtol=0, atol=1e-6)
    knobs = BlendKnobs(alpha=0.5, mode="attention_weighted")
    assert torch.equal(blend(V, E, knobs, token_weights=weights), made)
    for wrong in (None, weights[:-1], [math.nan] * T):
        with pytest.raises(RequestError, match="token weights"):
            blend(V, E, knobs, token_weights=wrong)


PICTURES = [V, rows(90, 8, 2.0), rows(T, 9, 5.0)]
SEVERAL = ("interpolate", "interpolate_area", "adain", "adain_global", "adain_per_dim", "per_token", "style_only")


@pytest.mark.parametrize("mode", SEVERAL)
def test_V30_weights_of_pictures_are_normalised_and_their_order_does_not_matter(mode: Any) -> None:
    knobs = BlendKnobs(alpha=0.4, mode=mode)
    for dtype in (torch.float64, torch.float32):
        pictures, text = [picture.to(dtype) for picture in PICTURES], E.to(dtype)
        made = blend(pictures, text, knobs, weights=[0.5, 0.3, 0.2])
        turned = [pictures[k] for k in (2, 0, 1)]
        tight = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
        torch.testing.assert_close(blend(pictures, text, knobs, weights=[5, 3, 2]), made, **tight)
        torch.testing.assert_close(blend(turned, text, knobs, weights=[0.2, 0.5, 0.3]), made, **tight)
        alone = blend(pictures[0], text, knobs)
        assert torch.equal(blend(pictures, text, knobs, weights=[1, 0, 0]), alone)
        assert torch.equal(blend(pictures[:1], text, knobs, weights=[1.0]), alone)
        assert not torch.equal(blend(pictures, text, knobs, weights=[0, 1, 0]), alone)


def test_V30_interpolate_is_the_weighted_mean_of_the_resampled_pictures() -> None:
    made = blend(PICTURES, E, BlendKnobs(alpha=1.0), weights=[0.5, 0.3, 0.2])
    mean = sum(w * resample(v, T) for w, v in zip((0.5, 0.3, 0.2), PICTURES, strict=True))
    torch.testing.assert_close(made, mean, rtol=0, atol=1e-12)


def test_V30_pooled_statistics_are_those_of_the_rows_together() -> None:
    same = [rows(400, 3), rows(400, 3) * 2 + 1]
    made = blend_adain_per_dim(E, same, 1.0)
    pool = torch.cat(same)
    torch.testing.assert_close(made.mean(dim=0), pool.mean(dim=0), rtol=0, atol=1e-9)
    torch.testing.assert_close(made.std(dim=0), pool.std(dim=0), rtol=2e-3, atol=0)


def test_V30_concatenated_pictures_are_one_long_picture() -> None:
    knobs = BlendKnobs(alpha=0.4)
    assert torch.equal(blend(PICTURES, E, knobs, concat=True), blend(torch.cat(PICTURES), E, knobs))
    with pytest.raises(RequestError, match="weights must be left out"):
        blend(PICTURES, E, knobs, concat=True, weights=[1, 1, 1])


@pytest.mark.parametrize("weights", [[1, 1], [0, 0, 0], [-1, 1, 1], [math.nan, 1, 1]])
def test_V30_weights_that_are_none_are_an_error(weights: list[float]) -> None:
    with pytest.raises(RequestError, match="picture weights must be 3"):
        blend(PICTURES, E, BlendKnobs(), weights=weights)


@pytest.mark.parametrize("mode", ["linear", "style_delta"])
def test_V30_ways_for_one_picture_refuse_several(mode: Any) -> None:
    with pytest.raises(RequestError, match="must have one picture, got 3"):
        blend(PICTURES, E, BlendKnobs(mode=mode))


@pytest.mark.parametrize("mode", ["interpolate", "adain_per_dim"])
def test_the_first_token_can_be_protected(mode: Any) -> None:
    free, kept = (blend(V, E, BlendKnobs(alpha=0.5, mode=mode, protect_first_token=on)) for on in (False, True))
    assert torch.equal(kept[0], E[0]) and torch.equal(kept[1:], free[1:]) and not torch.equal(free[0], E[0])


def test_matrices_that_do_not_fit_are_refused() -> None:
    broken = V.clone()
    broken[3, 3] = math.nan
    for vl, words in (
        (V[:, :-1], "must be 48 wide"),
        (broken, "must be finite"),
        (V[0], "must be a matrix"),
        (V[:0], "must be"),
    ):
        with pytest.raises(RequestError, match=words):
            blend(vl, E)


@pytest.mark.parametrize("how", ["truncate", "interpolate", "pool", "attention_pool"])
def test_rows_are_compressed_to_what_the_transformer_takes(how: Any) -> None:
    long = rows(MAX_CAPTION_ROWS + 7, 3, dtype=torch.float32)
    made = compress_rows(long, how=how)
    assert made.shape == (1504, D)
    if how == "truncate":
        assert torch.equal(made, long[:1504])
    else:
        same = torch.ones_like(long)
        torch.testing.assert_close(compress_rows(same, how=how), torch.ones(1504, D))
    assert torch.equal(compress_rows(long[:1504], how=how), long[:1504])


def test_attention_pool_leans_to_the_rows_that_agree() -> None:
    share = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.2]])
    made = compress_rows(share, 1, "attention_pool")
    assert made[0, 0] > share.mean(dim=0)[0]
    with pytest.raises(RequestError, match="most rows must be at least 1"):
        compress_rows(share, 0)


def test_S26_the_report_names_the_std_of_what_was_blended() -> None:
    made = blend(V, E)
    assert blend_report(E, V, made) == [
        f"text: {T} rows, std {E.std():.4f}",
        f"picture: {S} rows, std {V.std():.4f}",
        f"blended: {T} rows, std {made.std():.4f}",
    ]
