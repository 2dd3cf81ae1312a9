"""Attention by name: torch's, the definition, and libraries that fakes stand in for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qengine.errors import KernelError
from qengine.kernels.attention import ALIASES, LIBRARIES, MODES, attend, attend_weighted, libraries, reference

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

CALLS = {
    "flash": {"dropout_p": 0.0, "causal": False},
    "xformers": {"attn_bias": None, "p": 0.0},
    "sage": {"tensor_layout": "NHD", "is_causal": False, "pv_accum_dtype": "fp32"},
}


def tensors(queries: int, keys: int, heads: int = 3, width: int = 20, dtype: torch.dtype = torch.float32) -> Tensors:
    made = (torch.randn(2, count, heads, width).to(dtype) for count in (queries, keys, keys))
    query, key, value = made
    return query, key, value


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (query, keys, values))
    weights = (q @ k.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    return float((made.double() - expected).norm() / expected.norm())


def fake(monkeypatch: pytest.MonkeyPatch, mode: str, answer: Callable[..., Any]) -> None:
    """Put a library in the place of the real one."""
    library = LIBRARIES[mode]
    package, _, inner = library.module.partition(".")
    module = ModuleType(library.module)
    setattr(module, library.function, answer)
    root = module
    if inner:
        root = ModuleType(package)
        setattr(root, inner, module)
    monkeypatch.setitem(sys.modules, package, root)
    monkeypatch.setitem(sys.modules, library.module, module)


@pytest.mark.parametrize(("queries", "keys"), [(423, 423), (1, 213), (213, 1), (7, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_M13_sdpa_and_the_definition_are_attention(queries: int, keys: int, dtype: torch.dtype) -> None:
    given = tensors(queries, keys, dtype=dtype)
    expected = exact(*given)
    eager = error(
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given)).transpose(1, 2).flatten(2), expected
    )
    for mode in ("sdpa", "torch", "math"):
        made = attend(*given, mode=mode)
        assert made.dtype == dtype and made.shape == (2, queries, 60)
        assert error(made, expected) <= max(2 * eager, 1e-6)


def test_M13_sdpa_is_what_torch_does_bit_for_bit() -> None:
    query, keys, values = tensors(50, 70)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, keys, values)))
    assert torch.equal(attend(query, keys, values), expected.transpose(1, 2).flatten(2))
    assert torch.equal(attend(query, keys, values, mode="torch"), attend(query, keys, values, mode="sdpa"))


def test_the_definition_is_the_same_in_chunks_and_gives_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = tensors(33, 41)
    whole, sums = reference.attend(query, keys, values)
    monkeypatch.setattr(reference, "CHUNK_SCORES", 2 * 41 * 5)
    parts, again = reference.attend(query, keys, values)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
    scores = query.double().transpose(1, 2) @ keys.double().permute(0, 2, 3, 1) * 20**-0.5
    torch.testing.assert_close(again.double(), scores.logsumexp(-1).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(sums, again) or error(sums, again.double()) < 1e-6


def test_sums_join_two_parts_of_the_keys() -> None:
    query, keys, values = tensors(9, 30)
    (first, low), (second, high) = (
        reference.attend(query, keys[:, part], values[:, part]) for part in (slice(0, 12), slice(12, 30))
    )
    share = torch.sigmoid(low - high)[..., None]
    joined = share * first.unflatten(-1, (3, 20)) + (1 - share) * second.unflatten(-1, (3, 20))
    torch.testing.assert_close(joined.flatten(2), reference.attend(query, keys, values)[0], atol=1e-6, rtol=1e-5)


def test_the_definition_stands_scores_that_overflow_float16() -> None:
    query, keys, values = tensors(8, 8, dtype=torch.bfloat16)
    made = attend(query * 3e4, keys * 3e4, values, mode="math")
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("mode", LIBRARIES)
def test_M13_a_library_gets_its_layout_its_scale_and_no_mask(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    query, keys, values = tensors(6, 10, dtype=torch.bfloat16)
    seen: list[tuple[Any, Any]] = []

    def answer(*given: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((given, options))
        return given[0] + 1

    fake(monkeypatch, mode, answer)
    name = next((alias for alias, known in ALIASES.items() if known == mode), mode)
    assert torch.equal(attend(query, keys, values, mode=name), (query + 1).flatten(2))
    ((given, options),) = seen
    assert all(a is b for a, b in zip(given, (query, keys, values), strict=True))
    assert options.pop(LIBRARIES[mode].scale) == 20**-0.5
    assert options == CALLS[mode]


def test_M13_sage_is_never_asked_for_sums_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "sage", lambda query, *_, **__: query)
    module = sys.modules["sageattention"]
    monkeypatch.setattr(module, "sageattn", lambda *_, **__: pytest.fail("its own choice was taken"), raising=False)
    attend(*tensors(2, 2, dtype=torch.float16), mode="sage")


@pytest.mark.parametrize("mode", LIBRARIES)
def test_M13_a_library_that_is_not_there_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match=rf"got '{mode}': .* is not installed: pip install"):
        attend(*tensors(2, 2, dtype=torch.bfloat16), mode=mode)


def test_a_library_without_the_function_or_built_for_another_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sageattention", ModuleType("sageattention"))
    assert "has no sageattn_qk_int8_pv_fp16_cuda" in libraries.importable("sage")
    monkeypatch.setattr(libraries, "find_spec", lambda name: object())

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(libraries, "import_module", broken)
    assert "undefined symbol" in libraries.importable("flash") and "pip install" in libraries.importable("flash")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, k, v: (q[0], k, v), "query must be floats"),
        (lambda q, k, v: (q.int(), k, v), "query must be floats"),
        (lambda q, k, v: (q[:, :0], k, v), "not empty"),
        (lambda q, k, v: (q, k[..., :5], v), "keys must be"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "keys must be"),
        (lambda q, k, v: (q, k[0], v), "keys must be"),
        (lambda q, k, v: (q, k, v[:, :3]), "values must be"),
        (lambda q, k, v: (q, k, v.bfloat16()), "values must be torch.float32"),
        (lambda q, k, v: (q, k.to("meta"), v), "keys must be"),
    ],
)
def test_what_is_no_attention_is_refused(change: Callable[..., Tensors], said: str) -> None:
    with pytest.raises(KernelError, match=said):
        attend(*change(*tensors(4, 6)))


def test_unknown_modes_and_32_bit_numbers_for_16_bit_libraries_are_refused() -> None:
    with pytest.raises(KernelError, match=f"mode must be one of {MODES[0]}"):
        attend(*tensors(4, 6), mode="fast")
    with pytest.raises(KernelError, match="query must be bfloat16 or float16 for flash"):
        attend(*tensors(4, 6), mode="flash")


def test_a_kernel_of_torch_that_is_not_here_is_an_error_and_no_other_runs() -> None:
    if torch.cuda.is_available():
        pytest.skip("a card has it")
    with pytest.raises(KernelError, match="query must be one that EFFICIENT_ATTENTION takes"):
        attend(*tensors(4, 6), mode="sdpa-efficient")


def test_no_setting_of_torch_is_left_changed() -> None:
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    for mode in ("sdpa", "sdpa-flash", "math"):
        attend(*tensors(4, 6), mode=mode)
    assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


def test_naming_the_modes_loads_no_torch() -> None:
    code = "import sys, qengine.kernels.attention; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def weigh(given: Tensors, gains: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in given)
    scores = q @ k.transpose(2, 3) * given[0].shape[-1] ** -0.5 + gains
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sdpa", "math"])
def test_gains_of_runs_of_keys_are_added_to_the_scores(mode: str, dtype: torch.dtype) -> None:
    given = tensors(31, 77, dtype=dtype)
    per_key = torch.randn(20)
    runs = [(40, 0.0), (17, -1.5), (20, per_key)]
    expected = weigh(given, torch.cat([torch.zeros(40), torch.full((17,), -1.5), per_key]).double())
    made = attend_weighted(*given, runs, mode=mode)
    assert made.dtype == dtype and made.shape == (2, 31, 60)
    assert error(made, expected) <= (2e-6 if dtype == torch.float32 else 8e-3)  # a bfloat16 has 8 bits


def test_gains_in_float64_are_exact_and_equal_gains_are_plain_attention_to_the_bit() -> None:
    given = tensors(9, 30, dtype=torch.float64)
    made = attend_weighted(*given, [(10, 0.0), (20, 0.7)])
    assert error(made, weigh(given, torch.tensor([0.0] * 10 + [0.7] * 20, dtype=torch.float64))) < 1e-14
    assert torch.equal(attend_weighted(*given, [(10, 0.3), (0, 9.0), (20, 0.3)]), attend(*given))


def test_gains_that_do_not_fit_and_modes_that_cannot_weigh_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(4, 6, dtype=torch.float16)
    with pytest.raises(KernelError, match="runs must add up to 6 keys, got"):
        attend_weighted(*given, [(4, 0.0), (1, 1.0)])
    with pytest.raises(KernelError, match=r"gain must be \[2\]"):
        attend_weighted(*given, [(4, 0.0), (2, torch.zeros(3))])
    with pytest.raises(KernelError, match="mode must be one of"):
        attend_weighted(*given, [(4, 0.0), (2, 1.0)], mode="mask")
    with pytest.raises(KernelError, match="must be sdpa where references have gains, got 'xformers'"):
        attend_weighted(*given, [(4, 0.0), (2, 1.0)], mode="xformers")


@pytest.mark.parametrize("mode", ["flash", "sage"])
def test_libraries_that_give_their_sums_can_weigh(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(7, 12, dtype=torch.float16)

    def answer(query, keys, values, **arguments):
        assert arguments[LIBRARIES[mode].sums] is True
        made, sums = reference.attend(query, keys, values)
        return made.unflatten(2, query.shape[2:]), sums.transpose(1, 2), None

    fake(monkeypatch, mode, answer)
    gains = torch.tensor([0.0] * 5 + [1.5] * 7)
    assert error(attend_weighted(*given, [(5, 0.0), (7, 1.5)], mode=mode), weigh(given, gains)) < 2e-3
    with pytest.raises(KernelError, match="gains per key"):
        attend_weighted(*given, [(5, 0.0), (7, gains[5:])], mode=mode)
