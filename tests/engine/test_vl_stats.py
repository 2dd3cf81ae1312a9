"""Reference statistics: what they are, and the files they are read from."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qengine.engine.vl import (
    Statistics,
    compute_statistics,
    default_path,
    get_outlier_dimensions,
    read_statistics,
    write_statistics,
)
from qengine.engine.vl.stats import require_statistics
from qengine.errors import InputError, OutputError, RequestError
from safetensors.torch import save_file

PROMPTS = ("a house", "a cat at night", "Homer Simpson")


def embeddings() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(length, 31, generator=generator) * 5 + 1 for length in (8, 11, 3)]
    for each in made:
        each[0, 4] = 13504.0
    return made


def test_V15_statistics_are_mean_and_std_of_all_rows_with_n_minus_1() -> None:
    found = compute_statistics(embeddings(), layer=-2, model="fingerprint", prompts=PROMPTS)
    x = np.concatenate([each.numpy().astype(np.float64) for each in embeddings()])
    np.testing.assert_allclose(found.mean.numpy(), x.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.std.numpy(), x.std(axis=0, ddof=1), rtol=1e-6)
    assert found.global_mean == pytest.approx(x.mean(), rel=1e-9)
    assert found.global_std == pytest.approx(x.std(ddof=1), rel=1e-9)
    assert (found.layer, found.model, found.prompts, found.num_tokens) == (-2, "fingerprint", PROMPTS, 22)


def same(found: Statistics, expected: Statistics) -> None:
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.std, expected.std)
    assert (found.global_mean, found.global_std) == (expected.global_mean, expected.global_std)


def test_V15_safetensors_npz_and_json_hold_the_same(tmp_path: Path) -> None:
    made = compute_statistics(embeddings(), layer=-2, model="fingerprint", prompts=PROMPTS)
    write_statistics(tmp_path / "a.safetensors", made)
    found = read_statistics(tmp_path / "a.safetensors")
    same(found, made)
    assert (found.layer, found.model, found.prompts, found.num_tokens) == (-2, "fingerprint", PROMPTS, 22)
    arrays: Any = {"per_dim_mean": made.mean.numpy(), "per_dim_std": made.std.numpy()}
    totals = {"global_mean": made.global_mean, "global_std": made.global_std}
    np.savez(tmp_path / "a.npz", **arrays, **{name: np.float64(value) for name, value in totals.items()})
    same(read_statistics(tmp_path / "a.npz"), made)
    document = {name: value.tolist() for name, value in arrays.items()} | totals | {"layer": -2, "num_tokens": 22}
    (tmp_path / "a.json").write_text(json.dumps(document))
    same(read_statistics(tmp_path / "a.json"), made)
    assert read_statistics(tmp_path / "a.json").layer == -2


def test_statistics_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(OutputError):
        write_statistics(blocked / "a.safetensors", compute_statistics(embeddings()))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_cache_holds_the_statistics_that_are_used_when_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QENGINE_CACHE", str(tmp_path))
    x = torch.cat(embeddings())
    with pytest.raises(RequestError, match="outlier dimensions must have reference statistics") as caught:
        get_outlier_dimensions(x)
    assert caught.value.hint is not None and "qengine stats" in caught.value.hint
    write_statistics(default_path(), Statistics(torch.zeros(31), x.std(dim=0) / torch.arange(1, 32)))
    assert [column for column, _ in get_outlier_dimensions(x, 28.5)] == [30, 29, 28]


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


GOOD = {"per_dim_mean": [0.0, 1.0], "per_dim_std": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "no json"),
        ("a.json", [1]),
        ("a.json", {"per_dim_mean": [0.0]}),
        ("a.json", GOOD | {"per_dim_std": [1.0, float("nan")]}),
        ("a.json", GOOD | {"per_dim_std": [1.0, -1.0]}),
        ("a.json", GOOD | {"per_dim_std": [1.0]}),
        ("a.json", GOOD | {"per_dim_std": [[1.0], [2.0, 3.0]]}),
        ("a.json", GOOD | {"layer": "two"}),
        ("a.npz", {"per_dim_mean": np.zeros(3)}),
        ("a.npz", {"per_dim_mean": np.zeros(3), "per_dim_std": np.full(3, np.inf)}),
        ("a.npz", {"per_dim_mean": np.zeros(3), "per_dim_std": np.array(["a", "b", "c"])}),
        ("a.npz", {"per_dim_mean": np.zeros(3), "per_dim_std": np.array([None, 1, 2], dtype=object)}),
        ("a.safetensors", {"per_dim_mean": torch.zeros(3)}),
        ("a.safetensors", {"per_dim_mean": torch.zeros(3), "per_dim_std": torch.zeros(3, 1)}),
        ("a.pt", "x"),
    ],
)
def test_a_file_that_is_no_statistics_is_an_input_error(name: str, content: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=name):
        read_statistics(write(tmp_path / name, content))


def test_missing_cut_and_oversized_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="readable"):
        read_statistics(tmp_path / "none.npz")
    for name in ("a.npz", "a.safetensors"):
        content: Any = {k: np.array(v) for k, v in GOOD.items()}
        write(tmp_path / name, content if name.endswith("npz") else {k: torch.tensor(v) for k, v in GOOD.items()})
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError):
            read_statistics(tmp_path / name)
    (tmp_path / "large.json").write_bytes(b" " * (16 << 20) + b"{}")
    with pytest.raises(InputError, match="at most"):
        read_statistics(tmp_path / "large.json")


def test_an_npz_whose_header_lies_about_its_size_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    lying = BytesIO()
    np.lib.format.write_array_header_1_0(lying, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("per_dim_mean.npy", lying.getvalue())
        archive.writestr("per_dim_std.npy", lying.getvalue())
    with pytest.raises(InputError, match="per_dim_mean.npy"):
        read_statistics(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("per_dim_mean.npy", bytes(17 << 20))
    with pytest.raises(InputError, match="17825792 bytes"):
        read_statistics(tmp_path / "b.npz")


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(RequestError, match="must have 2560 columns as the embeddings, got 31"):
        require_statistics(compute_statistics(embeddings()), 2560, "per_dim")


@pytest.mark.parametrize(
    "given",
    [[], [torch.ones(1, 4)], [torch.ones(2, 4), torch.ones(2, 5)], [torch.ones(4)], [torch.full((3, 4), torch.nan)]],
)
def test_embeddings_without_statistics_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="embeddings must"):
        compute_statistics(given)
