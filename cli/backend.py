"""The floor below, imported when first needed: torch is not paid for by ``--help`` or by a wrong flag."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..engine.defaults import Defaults
    from ..engine.events import Decoded, Encoded, Step
    from ..engine.plan import Choices, DeviceFacts, JobFacts, ModelFacts
    from ..engine.request import GenerateRequest
    from ..engine.session import Engine
    from ..loaders.source import ModelSource


def make_request(kind: str, fields: Mapping[str, Any], images: Sequence[Path], seed: int) -> GenerateRequest:
    """A validated request; needs no torch."""
    from ..engine.request import EditRequest, GenerateRequest

    if kind == "edit":
        return EditRequest(images=tuple(images), seed=seed, **fields)
    return GenerateRequest(seed=seed, **fields)


def check_picture(path: Path) -> None:
    """Read a picture once, so that a bad one is told before a model is read."""
    from ..engine.picture import load_picture

    load_picture(path)


def open_engine(progress: Callable[[int, int], None], **choice: Any) -> Engine:
    """``Engine.open``; the arguments are those of ``order.model_choice``, ``device_choice`` and ``memory_choice``."""
    from ..engine.session import Engine

    return Engine.open(choice.pop("model", None), progress=progress, **choice)


def facts_for(device: str, model: ModelFacts, job: JobFacts, choices: Choices) -> DeviceFacts:
    """A card as it is now, with what was tried on it for the kernels of a run."""
    from ..engine.components import pick_device
    from ..engine.measure import facts_for as measured

    return measured(pick_device(device), model, job, choices)


def packed_format(path: Path) -> str:
    """The weight format of a packed file."""
    from ..engine.stack import packed_format as read

    return read(path)


def phase_of(event: Encoded | Step | Decoded) -> str:
    """The phase that an event ends or goes on with: ``encode``, ``denoise`` or ``decode``."""
    from ..engine.events import Encoded, Step

    if isinstance(event, Encoded):
        return "encode"
    return "denoise" if isinstance(event, Step) else "decode"


def write_picture(path: Path, image: Image.Image, metadata: dict[str, Any] | None) -> None:
    """Write a picture, whole or not at all."""
    from ..engine.metadata import write_picture as write

    write(path, image, metadata)


def write_mask(path: Path, step: Step) -> None:
    """Write the mask of a step at the size of the picture, white where it changes."""
    from ..engine.keep.pixels import debug_picture
    from ..engine.metadata import write_picture as write

    if step.mask is not None:
        write(path, debug_picture(step.mask, step.size), None)


def write_latents(path: Path, latents: torch.Tensor, metadata: dict[str, Any] | None) -> None:
    """Write latents as safetensors, whole or not at all."""
    from ..engine.metadata import write_latents as write

    write(path, latents, metadata)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a written file says of its making."""
    from ..engine.metadata import read_metadata as read

    return read(path)


def check_job(path: Path) -> None:
    """Raise InputError for a job file that cannot be used."""
    from ..engine.qx.file import read_job

    read_job(path)


@contextlib.contextmanager
def cancelling(engine: Engine) -> Iterator[Engine]:
    """Free the engine on the way out; a Ctrl-C also stops threads that are still at work for it."""
    try:
        yield engine
    except KeyboardInterrupt:
        engine.cancel()
        raise
    finally:
        engine.close()


def open_source(**choice: Any) -> ModelSource:
    """``loaders.open_model``: headers only."""
    from ..loaders.source import open_model

    return open_model(choice.pop("model", None), **choice)


def defaults_of(source: ModelSource) -> Defaults:
    """What a model does when it is not told otherwise."""
    from ..engine.defaults import defaults_of as known

    return known(source.defaults)


def pack(
    source: ModelSource,
    component: str,
    weight_format: str,
    *,
    device: str,
    dtype: str,
    path: Path | None,
    progress: Callable[[int, int], None],
) -> Path:
    """Write a packed file for runs on a device in a compute dtype; returns where."""
    from ..engine.components import pick_device, pick_dtype
    from ..engine.packing import pack_component

    chosen = pick_dtype(dtype, pick_device(device))
    return pack_component(source, component, weight_format, dtype=chosen, path=path, progress=progress)


def pack_quanto(source: ModelSource, weight_format: str, path: Path, progress: Callable[[int, int], None]) -> None:
    """Write the transformer in optimum-quanto's names."""
    from ..engine.packing import pack_quanto as write

    write(source, weight_format, path, progress)
