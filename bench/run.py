"""``qengine bench``: run the benchmark files, print a table, keep the figures as JSON lines."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import QEngineError, RequestError
from ..version import __version__

HERE = Path(__file__).parent
PACKAGES = ("torch", "diffusers", "transformers", "numpy", "triton")


def names() -> list[str]:
    """The benchmarks there are: ``bench_vae.py`` is ``vae``."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks.

    Args:
        argv: names of benchmarks (all when empty), ``--json FILE`` for the JSON lines; anything after ``--`` goes to
            pytest (``-- --benchmark-compare``).

    Returns:
        pytest's exit code.

    Raises:
        RequestError: an unknown benchmark is named, or pytest-benchmark is not installed.
    """
    parser = argparse.ArgumentParser(prog="qengine bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which to run, of {', '.join(names())}; all when none is named")
    parser.add_argument("--json", type=Path, help="append one JSON line per benchmark to this file")
    own, passed_on = _split(list(sys.argv[1:] if argv is None else argv))
    options = parser.parse_args(own)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        raise RequestError(f"benchmark must be one of {', '.join(names())}, got {', '.join(unknown)}")
    if find_spec("pytest_benchmark") is None:
        raise RequestError("benchmarks need pytest-benchmark, got none", hint="pip install 'qengine[test]'")
    files = [str(HERE / f"bench_{name}.py") for name in options.names or names()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = _pytest([*files, f"--benchmark-json={report}", *passed_on])
        if not report.is_file() or not report.stat().st_size:
            return code or 1
        lines = list(_lines(json.loads(report.read_text())))
    sys.stdout.write(table(lines) + "\n")
    if options.json:
        with options.json.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return code


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _pytest(arguments: Sequence[str]) -> int:
    fixed = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-columns=min,median,max,rounds",
        "-o",
        "addopts=",
        "--timeout=0",
    ]
    if find_spec("pytest_timeout") is None:
        fixed.remove("--timeout=0")
    try:
        return subprocess.run([sys.executable, "-m", "pytest", *fixed, *arguments], check=False).returncode
    except OSError as error:
        raise QEngineError(f"pytest must start, got: {error}") from error


def _commit() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _versions() -> Iterator[tuple[str, str]]:
    yield "qengine", __version__
    for name in PACKAGES:
        if find_spec(name) is not None:
            yield name, metadata.version(name)


def _lines(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cpu = report["machine_info"].get("cpu", {})
    common = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu.get("brand_raw"), "cores": cpu.get("count"), "system": platform.platform()},
        "versions": dict(_versions()),
        "commit": _commit(),
    }
    for benchmark in report["benchmarks"]:
        stats = benchmark["stats"]
        yield {
            "benchmark": benchmark["name"],
            "min_seconds": stats["min"],
            "median_seconds": stats["median"],
            "rounds": stats["rounds"],
            **benchmark["extra_info"],
            **common,
        }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table: one row per benchmark, the extra figures of each in the last column."""
    own = {"benchmark", "min_seconds", "median_seconds", "rounds", "date", "machine", "versions", "commit"}
    rows = ["| benchmark | median s | min s | figures |", "|---|---|---|---|"]
    for line in lines:
        extra = ", ".join(f"{key} {_figure(value)}" for key, value in line.items() if key not in own)
        rows.append(f"| {line['benchmark']} | {line['median_seconds']:.4g} | {line['min_seconds']:.4g} | {extra} |")
    return "\n".join(rows)


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
