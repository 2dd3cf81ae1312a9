"""The engine: an opened model that turns requests into streams of events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Cancelled, PlanError
from ..loaders import ModelSource, open_model
from .ceiling import Ceiling, make_ceiling
from .components import Components, pick_device, pick_dtype
from .defaults import Defaults, defaults_of
from .denoise import Denoiser
from .encode import encode, given_of, only_cast
from .events import Decoded, Encoded, Result, Step
from .given import Given
from .job import Job
from .ladder import Ladder, Turn, what_would_fit
from .latents import unpack
from .measure import facts_for
from .picture import load_picture, to_picture
from .plan import Budget, Choices, JobFacts, ModelFacts, Plan, make_plan
from .record import describe, numerics
from .request import EditRequest, GenerateRequest
from .resolve import resolve
from .seen import Seen, encode_all
from .seen import encode as encode_picture
from .state import RunState

if TYPE_CHECKING:
    from PIL import Image

    from .conditioning import Conditioning
    from .reference.apply import Cast

    Picture = Image.Image | str | PathLike[str]


class Engine:
    """An opened model. Use :meth:`open`, and ``with`` to free it.

    One run at a time: :meth:`edit` and :meth:`generate` of other threads wait, :meth:`stream` refuses.
    :meth:`cancel` may be called from any thread.

    Args:
        source: the opened model.
        components: its parts.
        budget: ceilings.
        choices: how the weights are held.
    """

    def __init__(self, source: ModelSource, components: Components, budget: Budget, choices: Choices) -> None:
        self.source = source
        self._components = components
        self._budget, self._choices = budget, choices
        self._facts = ModelFacts.of(source)
        self._turn = Turn()
        self._ceiling: Ceiling | None = None
        self._cancelled = threading.Event()

    @classmethod
    def open(  # noqa: PLR0913 (a public front, all but the first by name)
        cls,
        model: str | PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        offline: bool = False,
        cache_dir: str | PathLike[str] | None = None,
        budget: Budget | None = None,
        choices: Choices | None = None,
        packed: str | PathLike[str] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **files: Any,
    ) -> Engine:
        """Read a model's headers; weights are read when a run first needs them.

        Args:
            model: a diffusers folder, a hub id, a short name, or None for the embedded tiny model.
            device: ``auto`` (CUDA if there is one, else CPU), ``cpu``, ``cuda`` or ``cuda:1``.
            dtype: ``auto`` (float32 on a CPU, bfloat16 on CUDA), ``float32`` or ``bfloat16``.
            offline: never ask the hub.
            cache_dir: folder of cached conditioning, modulation rows and packed files; None takes ``QENGINE_CACHE``,
                else the user's.
            budget: ceilings of device and host memory; on CUDA the allocator is limited while a phase runs, on a CPU
                every operation is counted. None takes what is free when a run is planned, less a margin.
            choices: weight formats, streaming, VAE tile; None follows the rules of the device.
            packed: a packed file of the transformer, made by ``qengine pack``; None keeps one in the cache.
            progress: called with bytes done and in all while weights are packed.
            files: ``dit``, ``vae``, ``text_encoder`` (all three) and ``tokenizer`` for single files, ``model_version``.

        Raises:
            CheckpointError: the model is missing, incomplete or of a kind that the engine does not run.
            DeviceError: the device is not there.
            RequestError: options contradict each other.
        """
        place = pick_device(device)
        source = open_model(model if model is None else fspath(model), offline=offline, **files)
        defaults_of(source.defaults)
        where, file = (None if path is None else Path(path) for path in (cache_dir, packed))
        components = Components(source, place, pick_dtype(dtype, place), where, file, progress)
        return cls(source, components, budget or Budget(), choices or Choices())

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
        return defaults_of(self.source.defaults)

    def plan(self, request: GenerateRequest) -> Plan:
        """How a request would be carried out now: formats, placement, predicted peaks; nothing is loaded.

        Raises:
            PlanError: it does not fit the ceilings; the message says what would.
            RequestError: the model does not do what is asked.
            InputError: a picture cannot be used.
        """
        return self._plan(self._resolve(request))

    def _resolve(self, request: GenerateRequest) -> Job:
        shape = self._components.family.shape(self.source)
        if request.given is not None:
            shape.check(request.given)
        return resolve(request, self.defaults, shape.multiple)

    def _plan(self, job: Job, only: tuple[str, ...] = ()) -> Plan:
        asked = replace(self._job_facts(job), only=only)
        device = facts_for(self.device, self._facts, asked, self._choices)
        return make_plan(self._facts, asked, self._budget, device, self._choices)

    def _job_facts(self, job: Job) -> JobFacts:
        return JobFacts.of(job, self.source.processor_config, dtype=str(self.dtype).removeprefix("torch."))

    def stream(
        self, request: GenerateRequest, *, resume: RunState | None = None, wait: bool = False
    ) -> Iterator[Encoded | Step | Decoded]:
        """Run a request: encode, denoise, decode, in that order.

        Leaving the loop (``break``, an exception, closing the generator) ends the run.

        Args:
            request: what to make.
            resume: a state of the same run to go on from; the steps before it are not done again.
            wait: wait for a run under way in another thread.

        Yields:
            Encoded once, Step per step, Decoded once.

        Raises:
            RequestError: the model does not do what is asked, a run is under way, or ``resume`` is of another run.
            InputError: a picture cannot be used.
            KernelError: a step was not finite, nor when it was done again in the definitions of all ops.
            Cancelled: :meth:`cancel` was called.
            PlanError: the request does not fit the ceilings.
            MemoryLadderError: memory ran out after every retry.
        """
        with self._turn.take(wait=wait):
            job, plan, ladder, climb = self._begin(request)
            try:
                conditionings, cached = climb("encode", lambda: encode(job, self._components, self._check))
                first = conditionings[job.shown(job.casts[0])]
                yield Encoded(first, cached, self.source.notes + job.notes + self._words(plan))
                denoiser = self._denoiser(job, conditionings, climb)
                state = denoiser.start() if resume is None else denoiser.accept(resume)
                while state.next_step < denoiser.total:
                    step = climb("denoise", partial(denoiser.advance, state))
                    ladder.tell(*step.notes)
                    state = step.state
                    yield step
                yield climb("decode", lambda: self._decode(denoiser, plan, state, ladder))
            finally:
                self._components.rest()

    def encode(self, request: GenerateRequest, *, wait: bool = False) -> Encoded:
        """Encode what a request says and shows, into the cache that :meth:`stream` looks into, and run nothing more.

        Many requests encoded one after another load the text encoder once.

        Args:
            request: what is to be made later.
            wait: wait for a run under way in another thread.

        Raises:
            RequestError: the model does not do what is asked, or a run is under way.
            InputError: a picture cannot be used.
            Cancelled: :meth:`cancel` was called.
            PlanError: the request does not fit the ceilings.
            MemoryLadderError: memory ran out after every retry.
        """
        with self._turn.take(wait=wait):
            job, plan, _, climb = self._begin(request, ("encode",))
            try:
                made, cached = climb("encode", lambda: encode(job, self._components, self._check))
            finally:
                self._components.rest()
            return Encoded(made[job.shown(job.casts[0])], cached, self.source.notes + job.notes + self._words(plan))

    def extract(self, request: GenerateRequest, *, wait: bool = False) -> Given:
        """Encode all that a run encodes, for a run elsewhere or later, and run nothing more.

        ``stream(request)`` and ``stream(replace(request, given=extract(request)))`` give the same bits on the same kind
        of device; the second needs neither the text encoder nor the pictures.

        Args:
            request: what is to be made.
            wait: wait for a run under way in another thread.

        Returns:
            Embeddings of the prompt, and of the negative prompt where guidance is on; latents of the pictures to edit
            and of the picture to start from, float32; all on the CPU.

        Raises:
            RequestError: as :meth:`encode`, or not every step sees every picture.
            InputError: a picture cannot be used.
            Cancelled: :meth:`cancel` was called.
            PlanError: the request does not fit the ceilings.
            MemoryLadderError: memory ran out after every retry.
        """
        with self._turn.take(wait=wait):
            job, _, _, climb = self._begin(request, ("encode", "reference"))
            every = only_cast(job)
            try:
                made, _ = climb("encode", lambda: encode(job, self._components, self._check))
                references, init = (), None
                if job.references or job.denoise is not None:
                    self._check()
                    references, init = climb("reference", lambda: encode_all(job, self._components))
            finally:
                self._components.rest()
        return given_of(job, made[job.shown(every)], references, init)

    def latents(self, image: Picture, *, size: tuple[int, int] | None = None, wait: bool = False) -> torch.Tensor:
        """Clean normalised latents [1, z, 1, h, w] of a picture, float32 on the CPU; only the VAE is loaded.

        Args:
            image: scaled to the size, and its edges repeated up to whole tokens.
            size: (width, height); None takes the picture's own.
            wait: wait for a run under way in another thread.

        Raises:
            RequestError: the size is out of range, or a run is under way.
            InputError: the picture cannot be used.
            PlanError: the size does not fit the ceilings.
            MemoryLadderError: memory ran out after every retry.
        """
        with self._turn.take(wait=wait):
            picture = load_picture(image).image
            more: dict[str, Any] = {"prompt": "-", "size": size or picture.size, "num_inference_steps": 1}
            if self.defaults.max_references == 0:
                request = GenerateRequest(init_image=picture, **more)
            else:
                request = EditRequest(images=(picture,), resize_control="image", **more)
            job, _, _, climb = self._begin(request, ("reference",))
            try:
                self._components.enter("reference")
                tokens = climb("reference", lambda: encode_picture(picture, job.target, self._components))
            finally:
                self._components.rest()
            return unpack(tokens, *job.target.grid).cpu()

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

    def release(self, *, vram: bool = True, ram: bool = True) -> None:
        """Free weights between runs; the next run reads them again.

        Args:
            vram: what lies on the device.
            ram: streamed weights in host memory; ``release(ram=False)`` keeps them for a quick return.

        Raises:
            RequestError: a run is under way, or host memory is to be freed under weights that stay on the device.
        """
        with self._turn.take(wait=False):
            self._components.release(vram=vram, ram=ram)

    def close(self) -> None:
        """Free the weights. The engine can be used again and reads them anew."""
        self._components.release()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(
        self, request: GenerateRequest, only: tuple[str, ...] = ()
    ) -> tuple[Job, Plan, Ladder, Callable[..., Any]]:
        """The job, its plan, and how its phases are climbed.

        Where the whole does not fit and only some phases are run, these alone are planned.
        """
        self._cancelled.clear()
        job = self._resolve(request)
        try:
            plan = self._plan(job)
        except PlanError:
            if not only:
                raise
            plan = self._plan(job, only)
        self._components.plan = plan
        ladder = self._ladder(plan)
        return job, plan, ladder, partial(ladder.climb, fitting=lambda: self._fitting(job, plan))

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("the run was cancelled")

    def _denoiser(self, job: Job, made: Mapping[Cast, Conditioning], climb: Callable[..., Any]) -> Denoiser:
        self._check()
        seen = climb("reference", lambda: Seen.of(job, self._components))
        self._check()
        key = self._key(job)
        return climb("denoise", lambda: Denoiser.prepare(job, made, seen, self._components, key, self._check))

    def _decode(self, denoiser: Denoiser, plan: Plan, state: RunState, ladder: Ladder) -> Decoded:
        self._check()
        job, keeper = denoiser.job, denoiser.keeper
        tokens, mask = denoiser.finish(state)
        self._components.enter("decode")
        latents = unpack(tokens, *state.grid)
        pixels = self._components.vae.decode(latents.to(self.device, self.dtype))
        image = to_picture(pixels[..., : job.target.height, : job.target.width].float().cpu())
        image = image if keeper is None else keeper.composite(image, mask)
        record = describe(job, self.source, plan, self.dtype)
        return Decoded(image, latents.cpu(), record, tuple(ladder.notes))

    def _ladder(self, plan: Plan) -> Ladder:
        if self._ceiling is None:
            limit = plan.ceilings.vram_bytes if self._budget.vram_bytes is not None else None
            self._ceiling = make_ceiling(self.device, limit, plan.device.context_bytes)
        return Ladder(self._components, self._ceiling)

    def _fitting(self, job: Job, plan: Plan) -> str:
        asked = replace(self._job_facts(job), only=tuple(phase.name for phase in plan.phases))
        return what_would_fit(self._facts, asked, plan, self._budget, self._choices)

    def _words(self, plan: Plan) -> tuple[str, ...]:
        """Notes of the plan, where there was something to decide."""
        asked = self._budget != Budget() or self._choices != Choices() or self.device.type != "cpu"
        return plan.notes if asked else ()

    def _key(self, job: Job) -> str:
        surroundings = {"model": self.source.fingerprint, "dtype": str(self.dtype), "device": self.device.type}
        return job.key(surroundings | numerics(self._components.planned))

    def _finish(self, request: GenerateRequest) -> Result:
        seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        notes: tuple[str, ...] = ()
        before = time.perf_counter()
        for event in self.stream(request, wait=True):
            now = time.perf_counter()
            seconds[_PHASES[type(event)]] += now - before
            before = now
            if isinstance(event, Encoded):
                notes = event.notes
            elif isinstance(event, Decoded):
                return Result(event.image, event.latents, event.metadata, notes + event.notes, seconds)
        raise RuntimeError("a stream ended without a picture")


_PHASES: dict[type, str] = {Encoded: "encode", Step: "denoise", Decoded: "decode"}
