"""Writes the README's tables from the recorded results: ``python -m qengine.bench.readme``.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` and is never edited by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import InputError
from .run import ours_seconds, rival_seconds, title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FIDELITY_GOAL = 0.012
"""Relative L2 that a linear layer in int8 may have at most."""

DEFINITIONS = ("reference", "dequantise")
"""Implementations that are the definition of an op."""

_HALVES = ("encoder", "decoder")


def _newest(results: Path) -> dict[str, dict[str, Any]]:
    """Newest line of every benchmark."""
    entries = map(json.loads, (results / "cpu.jsonl").read_text(encoding="utf-8").splitlines())
    return {entry["benchmark"]: entry for entry in entries}


def _vae(results: Path) -> str:
    """Bytes and drift of the VAE's weight formats."""
    rows = [
        "| VAE weights | encoder MB | decoder MB | PSNR of decoded pixels, dB | largest error | PSNR of latents, dB |",
        "|---|---|---|---|---|---|",
    ]
    found = {name: entry for name, entry in _newest(results).items() if "decode_psnr" in entry}
    for index, (name, entry) in enumerate(found.items()):
        if not index:
            rows.append("| bf16 | {:.1f} | {:.1f} | | | |".format(*(entry[f"{p}_bytes_bf16"] / 1e6 for p in _HALVES)))
        sizes = [f"{entry[f'{part}_bytes'] / 1e6:.1f}" for part in _HALVES]
        drift = [f"{entry['decode_psnr']:.1f}", f"{entry['decode_max_error']:.3f}", f"{entry['encode_psnr']:.1f}"]
        rows.append("| " + " | ".join([name.partition("[")[2].rstrip("]"), *sizes, *drift]) + " |")
    return "\n".join(rows)


def _speed(results: Path) -> str:
    """Every benchmark with its rival and its physical limit, and what else it tells.

    Ops that ran as they are defined are left out: they are a torch program like their rival.
    """
    newest = {
        name: entry
        for name, entry in _newest(results).items()
        if "decode_psnr" not in entry and entry.get("implementation") not in DEFINITIONS
    }
    rows = [
        "| what | qengine s | rival s | faster | limit | of limit | memory and rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in newest.values():
        rival = rival_seconds(entry)
        cells = [
            title(entry).replace("_", " ") + (f" ({entry['implementation']})" if "implementation" in entry else ""),
            f"{ours_seconds(entry):.3g}",
            "" if rival is None else f"{rival:.3g}",
            f"{entry['speedup']:.2f}x" if "speedup" in entry else "",
            entry.get("limit", ""),
            f"{entry['fraction_of_limit']:.0%}" if "fraction_of_limit" in entry else "",
            _remark(entry),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    machine = next(iter(newest.values()))
    versions = machine["versions"]
    rows += [
        "",
        f"{machine['machine']['cpu']}, {machine['machine']['cores']} cores; torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; each row measured against its rival and limit in one run, in turns (least of the "
        "rounds; `faster` and `of limit` are medians of the rounds' ratios). Limits: `copy`, the bytes that must move "
        "at the speed of a plain copy; `gemm`, the product by the best library.",
    ]
    return "\n".join(rows)


def _remark(entry: Mapping[str, Any]) -> str:
    """Memory beside the rival's, peak and slowdown of a placement, or images per minute."""
    if "memory_ratio" in entry:
        return f"{entry['memory_ratio']:.2f} of the rival's memory"
    if "x_resident" in entry:
        return f"peak {entry['peak_mb']:.3g} MB, {entry['x_resident']:.2f} x the time of resident weights"
    if "images_per_minute" in entry:
        ours, theirs = entry["images_per_minute"], entry["diffusers_images_per_minute"]
        return f"{ours:.3g} images per minute, rival {theirs:.3g}"
    return ""


def _tiny(results: Path) -> str:
    """Fidelity of the embedded model per edit and size."""
    found = json.loads((results / "tiny.json").read_text(encoding="utf-8"))
    sizes = found["sizes"]
    names = list(next(iter(sizes.values()))["psnr"])
    rows = ["| edit | nearest other | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 2) + "|"]
    for name in names:
        cells = " | ".join(f"{mean(size['psnr'][name]):.1f}" for size in sizes.values())
        rows.append(f"| {name} | {found['nearest_other_edit_psnr'][name]:.1f} | {cells} |")
    rows.append("| **mean** | | " + " | ".join(f"**{size['mean_psnr']:.1f}**" for size in sizes.values()) + " |")
    rows.append(
        "| asked edit nearest, % | | " + " | ".join(f"{s['nearest_percent']:.1f}" for s in sizes.values()) + " |"
    )
    rows.append("| photos | | " + " | ".join(str(len(s["psnr"][names[0]])) for s in sizes.values()) + " |")
    held, swap = found["held_out"], found["exchange"]
    rows += [
        "",
        f"Wordings held out of training: {held['tried'] - len(held['wrong'])} of {held['tried']} right. Exchanging the "
        f"embeddings of two prompts exchanged the edits in {swap['right']} of {swap['tried']} cases.",
    ]
    return "\n".join(rows)


def _references(results: Path) -> str:
    """How far from the input each reference method leads at each strength, and what masks keep."""
    lines = [json.loads(line) for line in (results / "references.json").read_text(encoding="utf-8").splitlines()]
    found = {line["case"]: line for line in lines}
    strengths = list(dict.fromkeys(case.partition(" ")[2] for case in found if case.startswith("default ")))
    rows = ["| method | " + " | ".join(f"strength {s}" for s in strengths) + " |", "|---" * (len(strengths) + 1) + "|"]
    for method in dict.fromkeys(case.partition(" ")[0] for case in found if case.partition(" ")[2] in strengths):
        rows.append(f"| {method} | " + " | ".join(_drift(found[f"{method} {s}"]) for s in strengths) + " |")
    for case, line in found.items():
        if case.partition(" ")[2] not in strengths:
            kept = (
                f"{_drift(line)}; {line['equal_share']:.0%} of the pixels equal" if line["equal_share"] > 0.01 else ""
            )
            rows.append(f"| {case} | {kept or _drift(line)}" + " |" * len(strengths))
    return "\n".join(rows)


def _drift(line: Mapping[str, Any]) -> str:
    return f"{line['psnr_db']:.1f} dB, ΔE {line['delta_e']:.1f}, shift {line['shift_pixels']:.1f}"


def _fidelity(results: Path) -> str:
    """What weight formats cost in accuracy."""
    lines = (results / "fidelity.jsonl").read_text(encoding="utf-8").splitlines()
    return fidelity_table([json.loads(line) for line in lines])


def fidelity_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Two tables of the lines of ``qengine.bench.fidelity``: each linear layer, then the embedded model end to end."""
    layers = [line for line in lines if line["kind"] == "linear"]
    formats = list(dict.fromkeys(line["format"] for line in layers))
    rows = ["| linear [N, K] | values | " + " | ".join(formats) + " |", "|---" * (len(formats) + 2) + "|"]
    found: dict[tuple[str, str], list[str]] = {}
    for line in layers:
        key = f"{line['layer']} {line['shape']}", line["values"]
        found.setdefault(key, []).append(f"{line['relative_l2']:.4f}")
    rows += ["| " + " | ".join([*key, *cells]) + " |" for key, cells in found.items()]
    worst = max((line["relative_l2"] for line in layers if line["format"] == "int8"), default=0.0)
    verdict = "reached" if worst <= FIDELITY_GOAL else "missed"
    rows += ["", f"Largest error of int8: {worst:.4f}; the goal of at most {FIDELITY_GOAL} is {verdict}.", ""]
    rows += [
        "| tiny model | PSNR, dB (least) | SSIM (least) | relative L2 of final latents (largest) "
        "| least cosine of embeddings to bf16 |",
        "|---|---|---|---|---|",
    ]
    for line in (line for line in lines if line["kind"] == "drift"):
        cells = [
            line["format"],
            f"{line['psnr']:.1f} ({line['least_psnr']:.1f})",
            f"{line['ssim']:.4f} ({line['least_ssim']:.4f})",
            f"{line['latents_relative_l2']:.4f} ({line['largest_latents_relative_l2']:.4f})",
            f"{line['embeds_least_cosine']:.4f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "speed": _speed,
    "vae": _vae,
    "tiny": _tiny,
    "fidelity": _fidelity,
    "references": _references,
}


def render(text: str, results: Path = RESULTS) -> str:
    """The README with every table made anew.

    Raises:
        InputError: a table's markers are missing.
    """
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise InputError(f"README.md must hold the markers of table {name}, got none")
        table = make(results)
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> None:
    """Rewrite README.md in place."""
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
