"""``qengine bench``: its table, its JSON lines, and what it hands to pytest-benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from qengine.bench import run
from qengine.errors import RequestError

BENCH = """
def test_nothing(benchmark):
    benchmark.extra_info |= {"op": "nothing", "case": "3x4", "ours_seconds": 0.5, "rival_seconds": 1.5, "speedup": 3.0}
    benchmark.extra_info |= {"limit": "copy", "limit_seconds": 0.4, "fraction_of_limit": 0.8, "error": 0.001}
    benchmark.pedantic(lambda: None, rounds=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one benchmark file, which is also the working directory."""
    (tmp_path / "bench_nothing.py").write_text(BENCH)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_has_rival_and_limit_beside_our_time_and_the_lines_tell_machine_versions_and_commit(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = folder / "lines.jsonl"
    assert run.main(["nothing", "--json", str(lines)]) == 0
    assert "| nothing 3x4 | 0.5 | 1.5 | 3.00x | copy | 0.4 | 80% | error 0.001 |" in capfd.readouterr().out
    (line,) = map(json.loads, lines.read_text().splitlines())
    assert line["benchmark"] == "test_nothing" and line["rounds"] == 2
    assert line["machine"]["system"] and line["versions"]["torch"] and "commit" in line


def test_a_saved_run_is_compared_with_the_next_with_and_without_two_dashes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["nothing", "--benchmark-autosave"]) == 0
    assert len(list(folder.glob(".benchmarks/*/0001_*.json"))) == 1
    capfd.readouterr()
    assert run.main(["nothing", "--benchmark-compare"]) == 0
    assert "test_nothing (0001" in capfd.readouterr().out
    assert run.main(["nothing", "--", "--benchmark-compare=0001"]) == 0
    assert "test_nothing (0001" in capfd.readouterr().out


def test_a_comparison_that_fails_is_the_exit_code(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["nothing", "--benchmark-autosave"]) == 0
    saved = next(folder.glob(".benchmarks/*/*.json"))
    report = json.loads(saved.read_text())
    for name in ("min", "max", "mean", "median"):
        report["benchmarks"][0]["stats"][name] = 1e-12
    saved.write_text(json.dumps(report))
    assert run.main(["nothing", "--benchmark-compare", "--benchmark-compare-fail=min:10%"]) == 1
    assert "Performance has regressed" in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "benchmark must be one of nothing, got missing"),
        (["nothing", "--benchmark-compare", "0001"], "--benchmark-compare=0001"),
        (["nothing", "--verbose"], "put options for pytest after --"),
        (["nothing", "--benchmark-json=x.json"], "use --json FILE"),
    ],
)
def test_unknown_words_are_refused_with_what_to_write(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run.main(words)


def test_a_benchmark_that_fails_is_the_exit_code(folder: Path) -> None:
    (folder / "bench_nothing.py").write_text("def test_nothing(benchmark):\n    assert False\n")
    assert run.main(["nothing"]) == 1


def test_lines_without_rival_and_limit_leave_their_cells_empty() -> None:
    line = {"benchmark": "test_vae[decode-256]", "min_seconds": 1.0, "median_seconds": 2.0, "rounds": 1}
    other = line | {"diffusers_seconds": 3.0, "speedup": 3.0, "memory_ratio": 0.25}
    rows = run.table([line, other]).splitlines()
    assert rows[2] == "| vae[decode-256] | 1 |  |  |  |  |  |  |"
    assert rows[3] == "| vae[decode-256] | 1 | 3 | 3.00x |  |  |  | memory_ratio 0.25 |"
