"""Numbers as people read them. GiB and seconds appear here and nowhere below the command line."""

from __future__ import annotations

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
KIB = 1024


def bytes_text(count: float) -> str:
    """1536 as ``1.5 KiB``."""
    unit = 0
    while abs(count) >= KIB and unit < len(UNITS) - 1:
        count /= KIB
        unit += 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 or count >= 100 else f"{count:.1f} {UNITS[unit]}"


def seconds_text(seconds: float) -> str:
    """75 as ``1 min 15 s``; 0.034 as ``0.03 s``."""
    if seconds >= 100:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def cost(seconds: float, rate: float) -> float:
    """``seconds * rate / 3600``: what a picture costs on a machine of that price per hour."""
    return seconds * rate / 3600


def cost_text(seconds: float, rate: float) -> str:
    """The cost of a picture and of a thousand of them, in the currency of the rate."""
    each = cost(seconds, rate)
    return f"{each:.6f} each, {1000 * each:.2f} per 1000, at {rate:g} per hour"


def table(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned columns, two spaces apart."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
