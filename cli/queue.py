"""``qengine extract IN/ --jobs FILE -o QUEUE``: one ``.qx`` file per job, for ``qengine render`` on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blend import BLEND, KNOBS
from .flag import Flag
from .options import DEVICE, KERNELS, MEMORY, MODEL, OUTPUT, PACKED, REQUEST, TALK, VARIANT
from .progress import Talk

LEASE_SECONDS = 60.0

FLAGS = (
    Flag(
        name="--jobs",
        metavar="FILE",
        help="Extract many: a .jsonl file with one JSON object per line whose keys are the names of extract's and "
        "generate's options, paths beside IN; one .qx per line goes into the folder of -o.",
    ),
    Flag(name="--resume", kind="switch", help="Go on with that folder: what was extracted of the same content stays."),
)
RENDER = (
    Flag(name="--output", short="-o", metavar="DIR", help="Folder of the results; <QUEUE>_out when not given."),
    Flag(name="--watch", kind="switch", help="Wait for more jobs when there are none; Ctrl-C ends it."),
    Flag(
        name="--lease",
        kind="float",
        metavar="SECONDS",
        help="Jobs of a worker on another machine are taken back when it has given no sign for so long; "
        f"{LEASE_SECONDS:g}. On the same machine they are taken back at once.",
    ),
    *(flag for flag in OUTPUT if flag.key in ("output_type", "no_metadata")),
)
RENDER_SECTIONS = {
    "Queue": RENDER,
    "For all jobs": tuple(flag for flag in REQUEST if flag.key not in ("prompt", "ref")),
    "Pictures as conditioning": KNOBS,
    "Blend with the prompt": BLEND,
    "Model": MODEL + VARIANT,
    "Device": DEVICE,
    "Memory": MEMORY + PACKED,
    "Kernels": KERNELS,
    "Words": TALK,
}


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Extract the jobs of a file into a queue; returns the exit code.

    Raises:
        QEngineError: as ``fill.fill``.
    """
    from .fill import fill

    return fill(words, values, talk)
