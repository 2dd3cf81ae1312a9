"""``python -m qengine.bench.gpu.table FILE``: the last run of a results file as Markdown, goals beside the figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]
GIB = 1 << 30
UNIT = 1e9

RESIDENT_GOAL = 0.9
BOUND_GOAL = 1.03
AT_CEILING_GOALS = {"12GiB": 1.03, "6GiB": 1.10}
GROUP_GOAL = 3.0
PLAN_GOAL = 0.05
LEAD_CASE = "fp8 12GiB"


def last_run(lines: Iterable[Line]) -> list[Line]:
    """The lines of the run that began last."""
    found = list(lines)
    return [line for line in found if line.get("run") == found[-1].get("run")] if found else []


def table(lines: Sequence[Line]) -> str:
    """Markdown: machine, our runs, rivals, kernels and how they were compiled, goals, and what did not run."""
    ours, rivals = _measured(lines, "engine"), _measured(lines, "rival")
    z, gemm = _measured(lines, "zimage"), _gemm_tflops(lines)
    parts = [
        _machine(lines),
        _ours("Qwen-Image-Edit-2511", ours, gemm),
        _rivals(rivals),
        _ours("Z-Image", z, gemm),
        _kernels(lines),
        _ahead(lines),
        _goals([*judge(ours, rivals), *(("Z-Image " + goal, got, met) for goal, got, met in judge_own(z))]),
        _missing(lines),
    ]
    return "\n\n".join(part for part in parts if part)


def _measured(lines: Sequence[Line], stage: str) -> dict[str, Line]:
    return {line["case"]: line for line in lines if line["stage"] == stage and line["status"] == "ok"}


def _machine(lines: Sequence[Line]) -> str:
    head = _measured(lines, "run").get("begin", {})
    found = _measured(lines, "probes")
    device, link = found.get("device", {}), found.get("link", {})
    versions = ", ".join(f"{name} {version}" for name, version in head.get("versions", {}).items())
    words = [f"{device.get('device')}, driver {device.get('driver')}, {versions}, commit {head.get('commit')}"]
    if link:
        rates = {kind: link[kind] for kind in ("registered", "pinned", "pageable")}
        text = ", ".join(f"{kind} {_number(rate and rate / UNIT)}" for kind, rate in rates.items())
        words.append(f"Link, GB/s from host memory: {text}.")
    products = [line for line in lines if line["stage"] == "probes" and "works" in line]
    for line in products:
        rate = f"{line['tflops']:.3g} TFLOP/s" if line["works"] else f"does not work ({line['error']})"
        words.append(f"- {line['case']} {'x'.join(map(str, line['shape']))}: {rate}")
    return "\n".join(words)


OUR_COLUMNS = (
    "s/step",
    "of bf16 GEMM",
    "x resident",
    "x bound",
    "streamed",
    "copies",
    "of link",
    "peak GiB",
    "ceiling GiB",
    "of plan",
    "host GiB",
    "registered GiB",
    "hash",
)


def _ours(model: str, ours: Mapping[str, Line], gemm_tflops: float | None) -> str:
    rows = [_our_row(case, line, ours, gemm_tflops) for case, line in ours.items()]
    return _grid((model, *OUR_COLUMNS), rows) if rows else ""


def _our_row(case: str, line: Line, ours: Mapping[str, Line], gemm_tflops: float | None) -> Sequence[str]:
    moved = line["streamed_bytes_per_step"] / line["seconds_per_step"]
    return (
        case,
        _number(line["seconds_per_step"]),
        "-" if gemm_tflops is None else _share(line["tflops"] / gemm_tflops),
        _number(_against(line, ours)),
        _number(_bound(line, ours)),
        f"{line['streamed']}/{line['blocks']}",
        f"{line['copies']}/{line['copies_planned']}",
        _share(moved / line["link_bytes_per_second"]),
        _gib(line["peak_bytes"]),
        _gib(line["ceiling_bytes"]),
        _share(line["peak_bytes"] / line["plan_bytes"]),
        _gib(line["host_bytes"]),
        line["refusal"] or _gib(line["registered_bytes"]),
        line["hash"][:8],
    )


def _gemm_tflops(lines: Sequence[Line]) -> float | None:
    """The best rate of a bfloat16 product in this run."""
    rates = [line["tflops"] for line in lines if line["stage"] == "probes" and line["case"] == "bf16" and line["works"]]
    return max(rates, default=None)


def _rivals(rivals: Mapping[str, Line]) -> str:
    head = ("diffusers bf16", "s/step", "peak GiB", "ceiling GiB", "process GiB")
    rows = [
        (
            case,
            _number(line["seconds_per_step"]),
            _gib(line["peak_bytes"]),
            _gib(line["ceiling_bytes"]),
            _gib(line["process_bytes"]),
        )
        for case, line in rivals.items()
    ]
    return _grid(head, rows) if rows else ""


def _kernels(lines: Sequence[Line]) -> str:
    checks = _measured(lines, "kernels")
    head = ("kernel", "by", "error", "bound", "ms", "eager ms", "faster", "limit", "limit ms", "of limit", "goal")
    rows = [_kernel_row(case, line) for case, line in checks.items()]
    return _grid(head, rows) if rows else ""


REACHED = {None: "not judged", True: "reached", False: "MISSED"}


def _kernel_row(case: str, line: Line) -> Sequence[str]:
    if not line["passed"]:
        return (case, "", "NOT PASSED", line["reason"].replace("\n", " "), *["-"] * 7)
    return (
        case,
        line.get("implementation", ""),
        f"{line['error']:.2g}",
        f"{line['bound']:.2g}",
        _number(1000 * line["ours_seconds"]),
        _number(1000 * line["rival_seconds"]),
        f"{line['speedup']:.2f}x",
        line["limit"],
        _number(1000 * line["limit_seconds"]),
        _share(line["fraction_of_limit"]),
        f"{line['goal']:.0%} {REACHED[line['reached']]}",
    )


def _ahead(lines: Sequence[Line]) -> str:
    head = ("compiled", "cc", "warps", "stages", "registers", "spilled bytes", "shared bytes")
    keys = ("cc", "warps", "stages", "registers", "spill_bytes", "shared_bytes")
    found = [line for line in lines if line["stage"] == "ahead" and line["status"] == "ok"]
    rows = [(f"{line['op']} {line['name']}", *(str(line[key]) for key in keys)) for line in found]
    return _grid(head, rows) if rows else ""


VERDICTS = {None: "not measured", True: "met", False: "NOT MET"}


Goal = tuple[str, float | None, bool | None]


def _goals(goals: Iterable[Goal]) -> str:
    rows = [(goal, _number(got), VERDICTS[met]) for goal, got, met in goals]
    return _grid(("goal", "measured", ""), rows)


def judge(ours: Mapping[str, Line], rivals: Mapping[str, Line]) -> Iterator[Goal]:
    """Every goal: its words, the figure, and whether it is met; None where it was not measured."""
    lead = ours.get(LEAD_CASE)
    got = _ratio(lead, rivals.get("resident"))
    yield f"{LEAD_CASE}: at most {RESIDENT_GOAL} x diffusers resident", got, _at_most(got, RESIDENT_GOAL)
    for name in ("group 12GiB", "group"):
        got = _ratio(rivals.get(name), lead)
        yield (
            f"{LEAD_CASE}: at least {GROUP_GOAL:g} x faster than {name}",
            got,
            None if got is None else got >= GROUP_GOAL,
        )
    yield from judge_own(ours)


def judge_own(ours: Mapping[str, Line]) -> Iterator[Goal]:
    """The goals of our runs among themselves: what streaming costs, memory, copies and bits."""
    for case, line in ours.items():
        if line["streamed"]:
            got = _bound(line, ours)
            yield f"{case}: at most {BOUND_GOAL} x max(resident, bytes / link)", got, _at_most(got, BOUND_GOAL)
        goal = AT_CEILING_GOALS.get(line["place"])
        if goal is not None and line["weights"] == "fp8":
            got = _against(line, ours)
            yield f"{case}: at most {goal} x resident", got, _at_most(got, goal)
        yield from _memory(case, line)
    yield from _bits(ours)


def _memory(case: str, line: Line) -> Iterator[Goal]:
    if line["ceiling_bytes"]:
        share = line["peak_bytes"] / line["ceiling_bytes"]
        yield f"{case}: peak / ceiling at most 1", share, share <= 1
    off = line["peak_bytes"] / line["plan_bytes"]
    yield f"{case}: peak / plan within {PLAN_GOAL:.0%}", off, abs(off - 1) <= PLAN_GOAL
    yield f"{case}: copies as planned", line["copies"], line["copies"] == line["copies_planned"]


def _bits(ours: Mapping[str, Line]) -> Iterator[Goal]:
    for weights in dict.fromkeys(line["weights"] for line in ours.values()):
        hashes = [line["hash"] for line in ours.values() if line["weights"] == weights]
        same = None if len(hashes) < 2 else len(set(hashes)) == 1
        yield f"{weights}: one hash in all {len(hashes)} placements", len(set(hashes)), same


def _against(line: Line, ours: Mapping[str, Line]) -> float | None:
    """Time against the resident run of the same format."""
    return _ratio(line, ours.get(f"{line['weights']} resident"))


def _bound(line: Line, ours: Mapping[str, Line]) -> float | None:
    """Time against the larger of computing (resident) and copying; only copying where no resident run was made."""
    if not line["streamed"]:
        return None
    resident = ours.get(f"{line['weights']} resident")
    copying = line["streamed_bytes_per_step"] / line["link_bytes_per_second"]
    return line["seconds_per_step"] / max(copying, resident["seconds_per_step"] if resident else 0.0)


def _ratio(ours: Line | None, theirs: Line | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return ours["seconds_per_step"] / theirs["seconds_per_step"]


def _at_most(got: float | None, goal: float) -> bool | None:
    return None if got is None else got <= goal


def _missing(lines: Sequence[Line]) -> str:
    rows = [
        (f"{line['stage']} {line['case']}", line["status"], line.get("reason", ""))
        for line in lines
        if line["status"] != "ok"
    ]
    return _grid(("did not run", "", "reason"), rows) if rows else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _gib(nbytes: int | None) -> str:
    return _number(None if nbytes is None else nbytes / GIB)


def _share(value: float) -> str:
    return f"{value:.1%}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main() -> None:
    """Print the table of the file named on the command line."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    sys.stdout.write(table(last_run(json.loads(line) for line in text.splitlines())) + "\n")


if __name__ == "__main__":
    main()
