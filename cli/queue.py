"""``qengine extract IN/ --jobs FILE -o QUEUE``: one ``.qx`` file per job, for ``qengine render`` on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .flag import Flag
from .progress import Talk

FLAGS = (
    Flag(
        name="--jobs",
        metavar="FILE",
        help="Extract many: a .jsonl file with one JSON object per line whose keys are the names of extract's and "
        "generate's options, paths beside IN; one .qx per line goes into the folder of -o.",
    ),
    Flag(name="--resume", kind="switch", help="Go on with that folder: what was extracted of the same content stays."),
)


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Extract the jobs of a file into a queue; returns the exit code.

    Raises:
        RequestError: always; this is not here yet.
    """
    raise RequestError("--jobs must be left out, got it: it is not here yet")
