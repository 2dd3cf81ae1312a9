"""The engine: an opened model that turns requests into streams of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Cancelled, RequestError
from ..loaders import ModelSource, open_model
from .components import Components, pick_device, pick_dtype
from .conditioning import Conditioning
from .defaults import DEFAULTS, Defaults
from .denoise import Denoiser
from .events import Decoded, Encoded, Result, Step
from .job import Job, resolve
from .latents import unpack
from .picture import resize, to_picture
from .record import describe
from .request import EditRequest, GenerateRequest
from .state import RunState

if TYPE_CHECKING:
    from PIL import Image

    Picture = Image.Image | str | PathLike[str]


class Engine:
    """An opened model. Use :meth:`open`, and ``with`` to free it.

    One run at a time; :meth:`cancel` may be called from any thread.
    """

    def __init__(self, source: ModelSource, components: Components) -> None:
        self.source = source
        self._components = components
        self._running = threading.Lock()
        self._cancelled = threading.Event()

    @classmethod
    def open(
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        offline: bool = False,
        cache_dir: str | PathLike[str] | None = None,
        **files: Any,
    ) -> Engine:
        """Read a model's headers; weights are read when a run first needs them.

        Args:
            model: a diffusers folder, a hub id, a short name, or None for the embedded tiny model.
            device: ``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: ``auto`` (float32 on a CPU, bfloat16 on CUDA), ``float32`` or ``bfloat16``.
            offline: never ask the hub.
            cache_dir: folder of cached conditioning and modulation rows; None takes ``QENGINE_CACHE``, else the user's.
            files: ``dit``, ``vae``, ``text_encoder`` (all three) and ``tokenizer`` for single files, ``model_version``.

        Raises:
            CheckpointError: the model is missing, incomplete or of an unknown kind.
            DeviceError: the device is not there.
            RequestError: options contradict each other.
        """
        place = pick_device(device)
        source = open_model(model if model is None else fspath(model), offline=offline, **files)
        where = None if cache_dir is None else Path(cache_dir)
        return cls(source, Components(source, place, pick_dtype(dtype, place), where))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._components.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self._components.dtype

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read from files since the engine was opened; grows while a phase loads."""
        parts = (self.source.transformer, self.source.vae, self.source.text_encoder)
        return sum(part.checkpoint.bytes_read for part in parts)

    @property
    def defaults(self) -> Defaults:
        """What the model does when a request leaves a field open."""
        return DEFAULTS[self.source.defaults]

    def stream(self, request: GenerateRequest, *, resume: RunState | None = None) -> Iterator[Encoded | Step | Decoded]:
        """Run a request: encode, denoise, decode, in that order.

        Leaving the loop (``break``, an exception, closing the generator) ends the run.

        Args:
            request: what to make.
            resume: a state of the same run to go on from; the steps before it are not done again.

        Yields:
            Encoded once, Step per step, Decoded once.

        Raises:
            RequestError: the model does not do what is asked, a run is under way, or ``resume`` is of another run.
            InputError: a picture cannot be used.
            Cancelled: :meth:`cancel` was called.
        """
        if not self._running.acquire(blocking=False):
            raise RequestError(
                "an engine must run one request at a time, got a second", hint="finish or close the first"
            )
        try:
            self._cancelled.clear()
            job = resolve(request, self.defaults, self._components.multiple)
            conditioning, cached = self._encode(job)
            yield Encoded(conditioning, cached, self.source.notes + job.notes)
            denoiser = self._denoiser(job, conditioning)
            state = denoiser.start() if resume is None else denoiser.accept(resume)
            while state.next_step < denoiser.total:
                step = denoiser.advance(state)
                state = step.state
                yield step
            yield self._decode(job, state)
        finally:
            self._running.release()

    def edit(self, images: Picture | list[Picture] | tuple[Picture, ...], prompt: str, **options: Any) -> Result:
        """Edit one picture or several; ``options`` are the fields of :class:`EditRequest`."""
        several = tuple(images) if isinstance(images, list | tuple) else (images,)
        return self._finish(EditRequest(images=several, prompt=prompt, **options))

    def generate(self, prompt: str, **options: Any) -> Result:
        """Make a picture from text; ``options`` are the fields of :class:`GenerateRequest`."""
        return self._finish(GenerateRequest(prompt=prompt, **options))

    def cancel(self) -> None:
        """Stop the run under way before its next block; safe from any thread. The stream raises Cancelled."""
        self._cancelled.set()

    def close(self) -> None:
        """Free the weights. The engine can be used again and reads them anew."""
        self._components.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    def _encode(self, job: Job) -> tuple[Conditioning, bool]:
        self._check()
        pictures = [resize(picture.image, *size) for picture, size in zip(job.pictures, job.conditions, strict=True)]
        return self._components.condition(job.prompt, job.negative_prompt, pictures, job.template, self._check)

    def _denoiser(self, job: Job, conditioning: Conditioning) -> Denoiser:
        self._check()
        return Denoiser.prepare(job, conditioning, self._components, self._key(job), self._check)

    def _decode(self, job: Job, state: RunState) -> Decoded:
        self._check()
        latents = unpack(state.latent_tokens, *state.grid)
        pixels = self._components.vae.decode(latents.to(self.device, self.dtype))
        image = to_picture(pixels[..., : job.target.height, : job.target.width].float().cpu())
        return Decoded(image, latents.cpu(), describe(job, self.source, self.device, self.dtype))

    def _key(self, job: Job) -> str:
        return job.key({"model": self.source.fingerprint, "dtype": str(self.dtype), "device": self.device.type})

    def _finish(self, request: GenerateRequest) -> Result:
        seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        notes: tuple[str, ...] = ()
        before = time.perf_counter()
        for event in self.stream(request):
            now = time.perf_counter()
            seconds[_PHASES[type(event)]] += now - before
            before = now
            if isinstance(event, Encoded):
                notes = event.notes
            elif isinstance(event, Decoded):
                return Result(event.image, event.latents, event.metadata, notes, seconds)
        raise RuntimeError("a stream ended without a picture")


_PHASES: dict[type, str] = {Encoded: "encode", Step: "denoise", Decoded: "decode"}
