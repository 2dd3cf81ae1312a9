"""``qengine bench``: run the benchmark files, print a table, keep the figures as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
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
        argv: names of benchmarks (all when empty), ``--json FILE`` for the JSON lines; ``--benchmark-*`` options
            (``--benchmark-autosave``, ``--benchmark-compare``) and anything after ``--`` go to pytest.

    Returns:
        pytest's exit code.

    Raises:
        RequestError: an unknown benchmark or option is named, or pytest-benchmark is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="qengine bench",
        description=__doc__,
        epilog="--benchmark-* options and anything after -- go to pytest: qengine bench vae --benchmark-autosave, "
        "later qengine bench vae --benchmark-compare",
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", help=f"which to run, of {', '.join(names())}; all when none is named")
    parser.add_argument("--json", type=Path, help="append one JSON line per benchmark to this file")
    own, passed_on = _split(list(sys.argv[1:] if argv is None else argv))
    for_plugin = [word for word in own if word.startswith("--benchmark-")]
    options, strange = parser.parse_known_args([word for word in own if word not in for_plugin])
    _check(for_plugin, strange)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        raise RequestError(
            f"benchmark must be one of {', '.join(names())}, got {', '.join(unknown)}",
            hint="give an option for pytest its value with =, as in --benchmark-compare=0001" if for_plugin else None,
        )
    if find_spec("pytest_benchmark") is None:
        raise RequestError("benchmarks need pytest-benchmark, got none", hint="pip install 'qengine[test]'")
    return _run(options.names or names(), [*for_plugin, *passed_on], options.json)


def _run(chosen: Sequence[str], passed_on: Sequence[str], json_lines: Path | None) -> int:
    files = [str(HERE / f"bench_{name}.py") for name in chosen]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = _pytest([*files, f"--benchmark-json={report}", *passed_on])
        if not report.is_file() or not report.stat().st_size:
            return code or 1
        lines = list(_lines(json.loads(report.read_text(encoding="utf-8"))))
    sys.stdout.write(table(lines) + "\n")
    if json_lines:
        with json_lines.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    return code


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _check(for_plugin: Sequence[str], strange: Sequence[str]) -> None:
    if strange:
        raise RequestError(
            f"option must be --json, --help or one of pytest-benchmark's, got {strange[0]}",
            hint="put options for pytest after --",
        )
    for word in for_plugin:
        if word.partition("=")[0] == "--benchmark-json":
            raise RequestError(f"report must be left to this command, got {word}", hint="use --json FILE")


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
    common = origin(report["machine_info"].get("cpu", {}).get("brand_raw"))
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


def origin(processor: str | None = None) -> dict[str, Any]:
    """Where a figure comes from: date, machine (its card too, if it has one), versions of the packages, and commit.

    Args:
        processor: its name; None takes what the system says.
    """
    import torch

    named = processor or platform.processor() or platform.machine()
    machine = {"cpu": named, "cores": os.cpu_count(), "system": platform.platform()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine | ({"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}),
        "versions": dict(_versions()),
        "commit": _commit(),
    }


RIVALS = ("rival_seconds", "diffusers_seconds", "safetensors_seconds")
"""Where a benchmark's line has its rival's time."""

_COLUMNS = ("benchmark", "qengine s", "rival s", "faster", "limit", "limit s", "of limit", "figures")
_SHOWN = {
    *("benchmark", "op", "case", "ours_seconds", "min_seconds", "median_seconds", "rounds", "speedup", "limit"),
    *("limit_seconds", "fraction_of_limit", "date", "machine", "versions", "commit", "seed"),
    *RIVALS,
}


def ours_seconds(line: Mapping[str, Any]) -> float:
    """The time measured in turns with a rival, or that of pytest-benchmark's rounds where there is none."""
    return line.get("ours_seconds", line["min_seconds"])


def rival_seconds(line: Mapping[str, Any]) -> float | None:
    """The rival's time, if there is one."""
    return next((line[name] for name in RIVALS if name in line), None)


def title(line: Mapping[str, Any]) -> str:
    """``op case``, or the name of the benchmark without ``test_``."""
    return f"{line['op']} {line['case']}" if "op" in line else line["benchmark"].removeprefix("test_")


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row per benchmark, its rival and physical limit beside it, what else it tells in the last column.

    Seconds are the least of the rounds; ``faster`` and ``of limit`` the medians of the rounds' ratios.
    """
    rows = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for line in lines:
        cells = [
            title(line),
            _figure(ours_seconds(line)),
            _figure(rival_seconds(line)),
            f"{line['speedup']:.2f}x" if "speedup" in line else "",
            line.get("limit", ""),
            _figure(line.get("limit_seconds")),
            f"{line['fraction_of_limit']:.0%}" if "fraction_of_limit" in line else "",
            ", ".join(f"{key} {_figure(value)}" for key, value in line.items() if key not in _SHOWN),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _figure(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
