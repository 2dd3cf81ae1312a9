"""Writes the README's tables from the recorded results: ``python -m qengine.bench.readme``.

A table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` and is never edited by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import InputError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
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
    """Every benchmark with a rival or a time of its own."""
    newest = {name: entry for name, entry in _newest(results).items() if "decode_psnr" not in entry}
    rows = ["| what | qengine s | rival s | faster | peak memory, qengine / rival |", "|---|---|---|---|---|"]
    for name, entry in newest.items():
        rival = entry.get("diffusers_seconds", entry.get("safetensors_seconds"))
        memory = entry.get("memory_ratio")
        cells = [
            name.removeprefix("test_").replace("_", " "),
            f"{entry['min_seconds']:.3g}",
            "" if rival is None else f"{rival:.3g}",
            f"{entry['speedup']:.2f}x" if "speedup" in entry else "",
            "" if memory is None else f"{memory:.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    machine = next(iter(newest.values()))
    versions = machine["versions"]
    rows += [
        "",
        f"{machine['machine']['cpu']}, {machine['machine']['cores']} cores; torch {versions['torch']}, diffusers "
        f"{versions['diffusers']}; each row measured against its rival in one run, in turns (least of the rounds; "
        "`faster` is the median of the rounds' ratios).",
    ]
    return "\n".join(rows)


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


TABLES: dict[str, Callable[[Path], str]] = {"speed": _speed, "vae": _vae, "tiny": _tiny}


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
