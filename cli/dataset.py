"""``qengine extract --dataset-config FILE --cache latents|text``: what a trainer reads instead of encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError
from .flag import Flag
from .progress import Talk

CACHES = ("latents", "text")

FLAGS = (
    Flag(
        name="--dataset-config",
        also=("--dataset_config",),
        metavar="FILE",
        help="Cache a dataset that this TOML file describes, in musubi-tuner's keys and file names; needs --cache.",
    ),
    Flag(name="--cache", choices=CACHES, help="What to cache: latents of pictures and controls, or captions."),
    Flag(
        name="--skip-existing",
        also=("--skip_existing",),
        kind="switch",
        help="Keep cache files that are there, made by whatever; by default those of the same content are kept.",
    ),
    Flag(
        name="--keep-cache",
        also=("--keep_cache",),
        kind="switch",
        help="Keep cache files of pictures that are no longer in the dataset.",
    ),
    Flag(
        name="--batch-size",
        also=("--batch_size",),
        kind="int",
        metavar="N",
        help="Taken as musubi-tuner writes it; pictures are encoded one at a time, whatever it says.",
    ),
    Flag(
        name="--num-workers",
        also=("--num_workers",),
        kind="int",
        metavar="N",
        help="Taken as musubi-tuner writes it; has no effect here.",
    ),
)


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Cache a dataset; returns the exit code.

    Raises:
        RequestError: always; this is not here yet.
    """
    raise RequestError("--dataset-config must be left out, got it: it is not here yet")
