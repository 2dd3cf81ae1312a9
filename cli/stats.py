"""``qengine stats``: reference statistics of a text encoder, which pictures' embeddings are measured against."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, RequestError
from . import backend
from .flag import Flag
from .memory import memory_choice
from .meter import PackMeter
from .options import DEVICE, MEMORY, MODEL, TALK
from .order import device_choice
from .progress import Talk

if TYPE_CHECKING:
    from ..engine.vl import Statistics

MAX_FILE_BYTES = 16 << 20
MAX_PROMPTS = 10_000
HELP = (
    "Measure a text encoder: mean and standard deviation of every column of its embeddings, over some prompts.\n\n"
    "qengine stats --model Z-IMAGE\n\nPicture conditioning needs them for --normalization-mode per_dim, for "
    "--outlier-masking and for --report. Without -o they go into the cache, where they are found by themselves."
)
FLAGS = (
    Flag(name="--model", short="-m", metavar="MODEL", help="The model whose text encoder is measured: a folder or id."),
    Flag(
        name="--text-encoder",
        also=("--text_encoder",),
        metavar="DIR",
        help="A Qwen3 text encoder alone, instead of --model: its folder or file.",
    ),
    Flag(name="--tokenizer", metavar="DIR", help="Tokenizer folder, where --text-encoder does not have one."),
    Flag(
        name="--prompts",
        metavar="FILE",
        help="Text with one prompt per line, or - for stdin; twelve of our own when not given.",
    ),
    Flag(
        name="--output",
        short="-o",
        metavar="FILE",
        help="File to write: .safetensors, .npz or .json; an existing one is replaced. The cache when not given.",
    ),
    *(flag for flag in MODEL if flag.key in ("model_version", "offline")),
)
SECTIONS = {"Statistics": FLAGS, "Device": DEVICE, "Memory": MEMORY, "Words": TALK}


def carry_out(words: Sequence[str], values: Mapping[str, Any], talk: Talk) -> int:
    """Measure, write and say where; returns the exit code.

    Raises:
        RequestError: not exactly one encoder is named, or there are no prompts.
        InputError: the prompts cannot be read.
        CheckpointError: the encoder is missing or damaged.
        OutputError: the file cannot be written, or has another suffix.
    """
    values = _with_model(words, values)
    prompts = None if values["prompts"] is None else read_prompts(values["prompts"])
    from ..engine.vl.reference import PROMPTS, write_reference
    from ..engine.vl.stats import default_path

    path = default_path() if values["output"] is None else Path(values["output"])
    _check_output(path)
    try:
        found = (_of_model if values["model"] is not None else _of_encoder)(values, prompts or PROMPTS, talk)
    finally:
        talk.display.close()
    write_reference(path, found)
    if values["output"] is None:
        talk.say(f"{'kept':<8} in the cache, where runs find them by themselves; -o FILE names another place")
    _tell(path, found, values["json"], talk)
    return 0


def read_prompts(place: str) -> list[str]:
    """One prompt per line; empty lines, and lines that begin with #, are none.

    Raises:
        InputError: missing, no text, too long, or without a prompt.
    """
    try:
        if place == "-":
            text = sys.stdin.read(MAX_FILE_BYTES + 1)
        else:
            with open(place, encoding="utf-8") as file:
                text = file.read(MAX_FILE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{place} must be a text file with one prompt per line, got: {reason}") from error
    place = "stdin" if place == "-" else place
    prompts = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if len(text) > MAX_FILE_BYTES or not 0 < len(prompts) <= MAX_PROMPTS:
        raise InputError(f"{place} must hold 1 to {MAX_PROMPTS} prompts, one per line, got {len(prompts)}")
    return prompts


def _with_model(words: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the positional model among them."""
    named = [*words, *(values[name] for name in ("model", "text_encoder") if values[name] is not None)]
    if len(named) != 1:
        raise RequestError(
            f"stats must get one text encoder, got {len(named)}",
            hint="qengine stats --model Z-IMAGE, or --text-encoder DIR",
        )
    if values["tokenizer"] is not None and values["text_encoder"] is None:
        raise RequestError("--tokenizer must come with --text-encoder, got it with a model")
    return {**values, "model": words[0] if words else values["model"]}


def _check_output(path: Path) -> None:
    from ..engine.vl.reference import SUFFIXES

    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise RequestError(f"output must be a file that ends in {', '.join(SUFFIXES)}, got {path}")


def _of_model(values: Mapping[str, Any], prompts: Sequence[str], talk: Talk) -> Statistics:
    """By the engine, under its plan."""
    from ..engine.vl.reference import layer_of, reference_statistics

    packing = PackMeter(talk)
    choice = {name: values[name] for name in ("model", "model_version", "offline") if values[name] is not None}
    choice |= device_choice(values) | memory_choice(values)
    talk.display.start("open")
    with backend.cancelling(backend.open_engine(packing, **choice)) as engine:
        source = engine.source
        talk.display.end(f"{source.label} ({source.variant}), {engine.device}")
        packing.phase = "encode"
        talk.display.start("encode", len(prompts))

        def encode(part: Sequence[str]) -> list[Any]:
            requests = [backend.make_request("generate", {"prompt": prompt}, (), 0) for prompt in part]
            return [engine.encode(request).conditioning.prompt_embeds for request in requests]

        return reference_statistics(
            encode,
            prompts,
            layer=layer_of(source.variant),
            model=source.text_encoder.checkpoint.fingerprint,
            progress=lambda done, total: talk.display.step(done, f"{done} of {total} prompts"),
        )


def _of_encoder(values: Mapping[str, Any], prompts: Sequence[str], talk: Talk) -> Statistics:
    """By the encoder alone, all of it on the device."""
    from ..engine.components import pick_device, pick_dtype
    from ..engine.vl.reference import open_encoder, open_text, reference_statistics
    from ..engine.zimage.encoder import HIDDEN_LAYER

    _check_alone(values)
    source = open_text(values["text_encoder"], values["tokenizer"])
    for note in source.notes:
        talk.warn(note)
    chosen = device_choice(values)
    device = pick_device(chosen["device"])
    dtype, packing = pick_dtype(chosen["dtype"], device), PackMeter(talk)
    encoder = open_encoder(source, device, dtype, values["text_encoder_weights"] or "bf16", packing)
    packing.phase = "encode"
    talk.display.start("encode", len(prompts))
    try:
        return reference_statistics(
            encoder.encode,
            prompts,
            layer=HIDDEN_LAYER,
            model=source.text_encoder.checkpoint.fingerprint,
            progress=lambda done, total: talk.display.step(done, f"{done} of {total} prompts"),
        )
    finally:
        encoder.release()


def _check_alone(values: Mapping[str, Any]) -> None:
    """What a plan would decide cannot be asked of the encoder alone."""
    names = [flag.key for flag in MEMORY if flag.key != "text_encoder_weights" and values[flag.key]]
    if names:
        given = ", ".join("--" + name.replace("_", "-") for name in names)
        raise RequestError(f"{given} must come with --model, got --text-encoder", hint="leave it out, or name a model")
    if values["text_encoder_weights"] == "auto":
        raise RequestError("--text-encoder-weights must be bf16, int8 or fp8 with --text-encoder, got auto")


def _tell(path: Path, found: Statistics, as_json: bool, talk: Talk) -> None:
    largest = found.std.argsort(descending=True)[:3].tolist()
    top = ", ".join(f"{column} ({float(found.std[column]):.4g})" for column in largest)
    talk.say(
        f"{'done':<8} {found.num_tokens} tokens of {len(found.prompts)} prompts, {found.width} dimensions, layer "
        f"{found.layer}: std {found.global_std:.4g}, largest in {top}"
    )
    if not as_json:
        print(path, flush=True)
        return
    about = {"model": found.model, "layer": found.layer, "ddof": 1, "num_prompts": len(found.prompts)}
    about |= {"num_tokens": found.num_tokens, "hidden_dim": found.width}
    about |= {"global_mean": found.global_mean, "global_std": found.global_std}
    print(json.dumps({"statistics": str(path), **about}, indent=2))
