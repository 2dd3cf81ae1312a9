"""``qengine generate --conditioning job.qx``: go on from what was read and encoded elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, RequestError
from . import backend
from .blend import said_of
from .meter import PackMeter
from .order import SINGLE_FILES, Conditioned, Order, Values, check_files, generate_order
from .outputs import check_preview_folder, choose
from .progress import Talk
from .run import Item, open_engine, run_one

if TYPE_CHECKING:
    from ..engine.qx import JobFile, Prepared
    from ..engine.session import Engine

MEASURES = ("text: ", "picture: ", "blended: ")
"""How the lines begin that say what the blend is made of."""
STAND_IN = "-"
"""For the prompt while it is not known whether the file has one."""


def conditioned_order(words: Sequence[str], values: Values) -> Order:
    """The order of ``qengine generate --conditioning``; the prompt may be the file's.

    Raises:
        RequestError: flags contradict each other.
        CheckpointError: no model is named.
    """
    if values.get("vl_model") is not None:
        raise RequestError(
            "pictures must be read once, got --conditioning and --vl-model",
            hint="leave --vl-model out: the file holds what was read",
        )
    if values["model"] is None and not any(values[name] for name in SINGLE_FILES):
        raise CheckpointError("model must be named, got none", hint="--model MODEL, the kind that the file is for")
    unsaid = not words and values["prompt"] is None and values["template"] is None
    order = generate_order(words, {**values, "prompt": STAND_IN} if unsaid else values)
    request = {name: value for name, value in order.request.items() if not (unsaid and name == "prompt")}
    statistics = values["vl_statistics"]
    never = (*order.wish.never, Path(values["conditioning"]), *([Path(statistics)] if statistics else []))
    return replace(
        order,
        request=request,
        wish=replace(order.wish, never=never),
        conditioning=Conditioned(file=values["conditioning"], said=said_of(values)),
    )


def recorded(record: Mapping[str, Any], picture: Path, values: Values) -> Conditioned | None:
    """The job file that a recorded run went on from: named by ``--conditioning``, else beside the picture.

    Raises:
        InputError: the record is not usable, or the file is not there.
        RequestError: a file is named for a picture that none was used for.
    """
    words, named = record.get("conditioning"), values.get("conditioning")
    if words is None and record["request"].get("given") is not None:
        again = "repeat the command with its --conditioning file"
        if "read" in record:
            again = "repeat its command; what qengine extract reads into a file can be rendered and repeated"
        raise InputError(
            f"{picture} must hold all that made it, got a record of parts that were encoded elsewhere", hint=again
        )
    if words is None:
        if named is not None:
            raise RequestError(f"--conditioning must be left out, got one for {picture}, which was made without")
        return None
    try:
        file, sha256 = str(words["file"]), str(words["sha256"])
        knobs, blend = dict(words.get("knobs") or {}), dict(words.get("blend") or {})
        found = _statistics(words.get("statistics"), picture)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the record in {picture} must be whole, got one without a usable conditioning") from error
    place = named or str(_beside(file, picture))
    said = {**knobs, **blend, **found}
    return Conditioned(file=place, said=said, alone=bool(words.get("alone")), sha256=sha256)


def carry_out(order: Order, talk: Talk) -> int:
    """Do an order that goes on from a job file; returns the exit code.

    Raises:
        InputError: the file is missing, foreign, cut or not the recorded one.
        RequestError: the prompt is missing, or something is out of range.
        CheckpointError: the file is for another model.
    """
    asked = order.conditioning
    if asked is None:
        raise RuntimeError("an order must go on from a job file")
    job = _read(asked)
    _check(job, order, asked)
    check_files(order.pictures)
    targets = choose(order.wish, order.seeds)
    if order.preview is not None:
        check_preview_folder(order.preview)
    results, packing = [], PackMeter(talk)
    try:
        with backend.cancelling(open_engine(order, talk, packing)) as engine:
            made = _prepared(job, order, asked, engine, talk)
            record = {"conditioning": words_of(made.record, asked.file, asked.said.get("statistics"))}
            for seed, target in zip(order.seeds, targets, strict=True):
                item = Item(replace(made.request, seed=seed), target, record)
                results.append(run_one(engine, order, item, talk, packing))
    finally:
        talk.display.close()
    if order.as_json:
        print(json.dumps({"outputs": results}, indent=2))
    return 0


def _read(asked: Conditioned) -> JobFile:
    from ..engine.qx import read_job

    job = read_job(asked.file)
    if asked.sha256 is not None and job.sha256 != asked.sha256:
        raise InputError(
            f"{asked.file} must be the recorded job file (sha256 {asked.sha256[:12]}), got {job.sha256[:12]}",
            hint="name that one with --conditioning",
        )
    return job


def _check(job: JobFile, order: Order, asked: Conditioned) -> None:
    """What can be wrong without the model."""
    from ..engine.qx.settings import settle
    from ..engine.qx.use import check_prompt
    from ..engine.vl import read_statistics

    settings = settle(job, _said(order, asked))
    check_prompt(job, settings)
    if settings.statistics is not None:
        read_statistics(settings.statistics)
    if "init_image" in order.request:
        backend.check_picture(order.request["init_image"])


def _said(order: Order, asked: Conditioned) -> dict[str, Any]:
    request = {name: value for name, value in order.request.items() if not (asked.alone and name == "prompt")}
    return {**asked.said, **request}


def _prepared(job: JobFile, order: Order, asked: Conditioned, engine: Engine, talk: Talk) -> Prepared:
    from ..engine.qx import prepare

    made = prepare(job, _said(order, asked), engine)
    for note in made.notes:
        if note.startswith(MEASURES):
            talk.say(f"{'blend':<8} {note}")
        else:
            talk.warn(note)
    return made


def words_of(record: Mapping[str, Any], file: str, statistics: str | Path | None) -> dict[str, Any]:
    """What the metadata of a picture says of its job file: names without folders, hashes, knobs.

    Args:
        record: of what was prepared.
        file: path or URL of the job file.
        statistics: the file that was given; None is the one in the cache, where the knobs need any.
    """
    from ..engine.qx.header import sha256_of
    from ..engine.qx.remote import base_name

    knobs = record.get("knobs") or {}
    if knobs.get("normalization_mode") in (None, "global") and knobs.get("outlier_masking") in (None, "none"):
        return {"file": base_name(file), **record}
    if statistics is None:
        from ..engine.vl.stats import default_path

        statistics = default_path()
    used = {"file": base_name(str(statistics)), "sha256": sha256_of(Path(statistics))}
    return {"file": base_name(file), **record, "statistics": used}


def _statistics(words: Any, picture: Path) -> dict[str, str]:
    """The recorded reference statistics, found by their bytes: beside the picture, here, or in the cache.

    Raises:
        InputError: they are in none of these.
    """
    if words is None:
        return {}
    from ..engine.qx.header import sha256_of
    from ..engine.vl.stats import default_path

    base = Path(str(words["file"]).replace("\\", "/")).name
    for path in (picture.parent / base, Path(base), default_path()):
        if path.is_file() and sha256_of(path) == words["sha256"]:
            return {"statistics": str(path)}
    raise InputError(
        f"{base}, the reference statistics of {picture}, must be beside it to repeat it, got none of its bytes",
        hint="put the file that was used there",
    )


def _beside(name: str, picture: Path) -> Path:
    """A file named in a record: beside the picture, else in the current folder.

    Raises:
        InputError: it is in neither.
    """
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    for path in (picture.parent / base, Path(base)):
        if path.is_file():
            return path
    raise InputError(
        f"{base} must be beside {picture} to repeat it, got no such file", hint="name it with --conditioning FILE"
    )
