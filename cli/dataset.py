"""``qengine extract --dataset-config FILE --cache latents|text``: what a trainer reads instead of encoding."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BatchError, RequestError
from .flag import Flag
from .progress import Talk
from .words import seconds_text

if TYPE_CHECKING:
    from ..engine.dataset import Cache, Dataset, VaeAlone
    from ..engine.dataset.cache import Maker
    from ..engine.session import Engine

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
        help="Keep cache files that are there, made of whatever; by default those of the same content are kept.",
    ),
    Flag(
        name="--keep-cache",
        also=("--keep_cache",),
        kind="switch",
        help="Keep cache files made here of pictures that are no longer in the dataset.",
    ),
    Flag(
        name="--batch-size",
        also=("--batch_size",),
        kind="int",
        metavar="N",
        help="Taken as musubi-tuner writes it; pictures are encoded one at a time, so it changes nothing.",
    ),
    Flag(
        name="--num-workers",
        also=("--num_workers",),
        kind="int",
        metavar="N",
        help="Taken as musubi-tuner writes it; it changes nothing.",
    ),
)


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Cache a dataset; returns the exit code.

    Raises:
        RequestError: flags are missing or do not belong here.
        InputError: the file or a folder in it cannot be used.
        BatchError: some pictures failed.
    """
    from ..engine.dataset import list_items, read_config

    _check(words, values)
    listed = []
    for dataset in read_config(Path(values["dataset_config"])):
        items, notes = list_items(dataset)
        for note in notes:
            talk.warn(note)
        listed.append((dataset, items))
    start = time.perf_counter()
    made: list[Cache] = []
    try:
        with _engine(values, talk) as engine:
            for dataset, items in listed:
                maker = _maker(engine, dataset, values)
                made += _fill(maker, items, values, talk)
    finally:
        talk.display.close()
    failed = _tell(made, values, talk, time.perf_counter() - start)
    if failed:
        raise BatchError(
            f"all {len(made)} pictures must be cached, got {failed} that failed", hint="mend or remove them"
        )
    return 0


def _check(words: Sequence[str], values: Mapping[str, Any]) -> None:
    if words:
        raise RequestError(f"a dataset must be named by --dataset-config alone, got {words[0]!r} too")
    if values["dataset_config"] is None:
        raise RequestError("--cache must stand beside --dataset-config, got it alone", hint="--dataset-config FILE")
    if values["cache"] is None:
        raise RequestError("--cache must be latents or text beside --dataset-config, got none", hint="--cache latents")
    for name in ("batch_size", "num_workers"):
        if values[name] is not None and values[name] < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be above 0, got {values[name]}")


def _engine(values: Mapping[str, Any], talk: Talk) -> Any:
    """The engine, or a VAE alone where musubi-tuner's command names no more; in ``with`` it is freed."""
    files = [name for name in ("model", "dit", "vae", "text_encoder") if values[name] is not None]
    if values["cache"] == "latents" and files == ["vae"]:
        return contextlib.nullcontext(_vae(values, talk))
    from . import backend
    from .memory import memory_choice
    from .meter import PackMeter
    from .order import Order, device_choice, make_wish, model_choice
    from .run import open_engine

    model = {**model_choice(values), **device_choice(values), **memory_choice(values)}
    wish = make_wish({"output": None, "save_path": None, "output_type": None}, "", "", ())
    order = Order(kind="generate", request={}, seeds=(0,), model=model, wish=wish)
    return backend.cancelling(open_engine(order, talk, PackMeter(talk)))


def _vae(values: Mapping[str, Any], talk: Talk) -> VaeAlone:
    from ..engine.dataset import VaeAlone
    from .options import MEMORY, PACKED
    from .order import device_choice

    planned = [flag.key for flag in MEMORY + PACKED if values[flag.key] and flag.key not in ("vae_tile", "vae_weights")]
    if planned:
        given = ", ".join("--" + name.replace("_", "-") for name in planned)
        raise RequestError(
            f"{given} must come with a whole model, got --vae alone", hint="leave it out, or name a model"
        )
    said = values["model_version"] or ("edit" if values["edit"] or values["edit_plus"] else "")
    made = VaeAlone.open(
        Path(values["vae"]),
        edits=said.startswith("edit"),
        **device_choice(values),
        vae_tile=values["vae_tile"],
        weight_format=values["vae_weights"],
    )
    talk.say(f"{'open':<8} {values['vae']} ({made.source.variant}), {made.device}")
    return made


def _maker(engine: Engine | VaeAlone, dataset: Dataset, values: Mapping[str, Any]) -> Maker:
    from ..engine.dataset.cache import Maker

    names = ("weights", "fp8_scaled") if values["cache"] == "latents" else ("text_encoder_weights", "fp8_vl")
    names += ("vae_weights",) if values["cache"] == "latents" else ("weights", "fp8_scaled", "text_encoder_cpu")
    said = {name: str(values[name]) for name in names if values.get(name)}
    return Maker(engine, values["cache"], dataset, keep=bool(values["skip_existing"]), surroundings=said)


def _fill(maker: Maker, items: Sequence[Any], values: Mapping[str, Any], talk: Talk) -> list[Cache]:
    from ..engine.dataset import cache_items, stale_files

    made: list[Cache] = []
    talk.display.start("cache", len(items))
    for cache in cache_items(maker, items):
        made.append(cache)
        if cache.error is not None:
            hint = f" ({cache.error.hint})" if cache.error.hint else ""
            talk.warn(f"{cache.error.message}{hint}")
        talk.display.step(len(made), f"{cache.state:<6} {cache.path or cache.item.path}")
        if cache.path is not None and not values["json"]:
            print(cache.path, flush=True)
    talk.display.end(f"{len(items)} pictures in {maker.dataset.cache_directory}")
    if not values["keep_cache"]:
        stale = stale_files(maker, made)
        for path in stale:
            path.unlink(missing_ok=True)
        if stale:
            talk.warn(f"{len(stale)} cache file(s) of pictures that are not in the dataset are removed: {stale[0]}")
    return made


def _tell(made: Sequence[Cache], values: Mapping[str, Any], talk: Talk, seconds: float) -> int:
    states = [cache.state for cache in made]
    counts = {state: states.count(state) for state in ("made", "kept", "failed")}
    talk.say("  ".join(f"{count} {state}" for state, count in counts.items()) + f"  {seconds_text(seconds)}")
    if values["json"]:
        lines = [
            {
                "image": str(cache.item.path),
                "state": cache.state,
                "cache": None if cache.path is None else str(cache.path),
                "error": None if cache.error is None else cache.error.message,
            }
            for cache in made
        ]
        print(json.dumps({"caches": lines}, indent=2))
    return counts["failed"]
