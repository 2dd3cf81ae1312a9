"""The parts of an opened model: loaded when a phase first needs them, held and freed as the plan says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeviceError, RequestError
from ..loaders import ModelSource
from .conditioning import Conditioning, ConditioningCache
from .encoder import PromptEncoder
from .families import family_of
from .family import Transformer
from .files import recall, write_tensors
from .mover import Placement, Tape
from .places import default_cache
from .plan import PhasePlan, Plan
from .stack import Hold
from .stack.pack import Progress
from .vae import ImageVAE

if TYPE_CHECKING:
    from PIL import Image


PROJECTION_VERSION = "1"

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def pick_device(device: str | torch.device) -> torch.device:
    """The asked device; ``auto`` is CUDA if there is one, else the CPU.

    Raises:
        DeviceError: CUDA is asked and not there.
        RequestError: the name is not a device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise RequestError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device must be one of {torch.cuda.device_count()} CUDA device(s), got {device}", hint="use --device cpu"
        )
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The asked compute dtype; ``auto`` is float32 on a CPU and bfloat16 on CUDA.

    Raises:
        RequestError: the name is not a compute dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise RequestError(f"dtype must be auto, float32 or bfloat16, got {dtype}")
    return chosen


class Components:
    """Encoder, transformer and VAE of one model on one device.

    Args:
        source: what was opened.
        device: where everything runs.
        dtype: compute dtype.
        cache: folder of cached conditioning, modulation rows and packed files; None takes :func:`default_cache`.
        packed: the transformer's packed file; None takes one in the cache where the format needs it.
        progress: called with bytes done and in all while blocks are packed.

    Attributes:
        family: what kind of model it is.
        plan: how the run under way is carried out.
        log: what was loaded and freed, in order: ``load transformer``, ``free text_encoder``.
    """

    def __init__(
        self,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path | None,
        packed: Path | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.source = source
        self.family = family_of(source)
        self.device = device
        self.dtype = dtype
        self.plan: Plan | None = None
        self.log: list[str] = []
        self._cache = cache or default_cache()
        self._packed, self._progress = packed, progress
        self._conditioning = ConditioningCache(self._cache / "conditioning")
        self._encoder: PromptEncoder | None = None
        self._transformer: Transformer | None = None
        self._vae: ImageVAE | None = None

    @property
    def multiple(self) -> int:
        """Pixels per token side: the VAE's factor times the patch of 2."""
        return self.family.shape(self.source).multiple

    def enter(self, phase: str) -> None:
        """Free what the plan does not keep beside a phase, before anything of the phase is loaded."""
        plan = self.planned
        component = plan.phase(phase).component
        for other in ("text_encoder", "transformer", "vae"):
            if other != component and other not in plan.kept_on_device:
                self.free(other, keep_host=other in plan.kept_on_host)

    def free(self, component: str, *, keep_host: bool = False) -> None:
        """Free a component; its streamed slabs may stay in host memory.

        Args:
            component: ``text_encoder``, ``transformer`` or ``vae``.
            keep_host: keep the slabs that lie on the host.
        """
        tape = self.tape(component)
        if keep_host and tape is not None and tape.host_bytes:
            if not tape.suspended:
                self.log.append(f"suspend {component}")
                tape.suspend()
            return
        if component == "text_encoder" and self._encoder is not None:
            self.log += ["free text_encoder"] if self._encoder.loaded else []
            self._encoder.release()
        elif component == "transformer" and self._transformer is not None:
            self.log.append("free transformer")
            self._transformer.close()
            self._transformer = None
        elif component == "vae" and self._vae is not None:
            self.log.append("free vae")
            self._vae = None

    def tape(self, component: str) -> Tape | None:
        """The blocks of a component, if they are loaded."""
        if component == "transformer":
            return None if self._transformer is None else self._transformer.blocks
        return self._encoder.tape if component == "text_encoder" and self._encoder is not None else None

    def shrink(self, phase: str) -> str:
        """Make room after an out-of-memory error: free every other component, then stream half of what is resident.

        Returns:
            What was done, for the notes.
        """
        component = self.planned.phase(phase).component
        for other in ("text_encoder", "transformer", "vae"):
            if other != component:
                self.free(other)
        tape = self.tape(component)
        if tape is not None:
            self._demote(component, tape)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        streamed = "" if tape is None else f", {len(tape.placement.streamed)} of {len(tape)} blocks streamed"
        return f"{phase} ran out of memory and is tried again{streamed}"

    def _demote(self, component: str, tape: Tape) -> None:
        resident = len(tape) - len(tape.placement.streamed)
        if resident == 0 or tape.placement.host == "mapped":
            self.free(component)
            return
        try:
            tape.demote(-(-resident // 2))
        except (RuntimeError, MemoryError):
            self.free(component)

    @property
    def vae(self) -> ImageVAE:
        """The image VAE."""
        if self._vae is None:
            plan = self.planned
            self.log.append("load vae")
            self._vae = self.family.load_vae(
                self.source.vae, self.device, self.dtype, plan.cut.tile_pixels, plan.formats.vae
            )
        return self._vae

    def projection(self) -> torch.Tensor:
        """The map from latents to RGB for previews; the VAE is loaded only where the cache does not hold it."""
        plan, checkpoint = self.planned, self.source.vae.checkpoint
        words = [checkpoint.identity, self.device.type, str(self.dtype), plan.formats.vae, PROJECTION_VERSION]
        words += [f"{op}={made}" for op, made in plan.kernels_of("vae").items()]
        key = hashlib.sha256("|".join(words).encode()).hexdigest()[:32]
        path = self._cache / "previews" / f"{key}.safetensors"
        stored = recall(path)
        if stored is not None and stored.keys() == {"projection"}:
            return stored["projection"]
        made = self.vae.rgb_projection()
        write_tensors(path, {"projection": made})
        return made

    @property
    def transformer(self) -> Any:
        """The diffusion transformer, at least as much of it streamed as the plan says."""
        phase = self.planned.phase("denoise")
        if self._transformer is not None:
            _follow(self._transformer.blocks, phase)
            return self._transformer
        self.log.append("load transformer")
        self._transformer = self.family.load_transformer(
            self.source.transformer,
            self.device,
            self.dtype,
            self._cache,
            Hold.of(phase, self.planned.kernels_of("transformer"), self._packed),
            self._progress,
        )
        return self._transformer

    def safe_transformer(self) -> Any:
        """The loaded transformer on the same tape, with 8-bit layers that multiply as they are defined.

        Its other ops run in their definitions where ``velocity`` is told so.
        """
        phase = self.planned.phase("denoise")
        hold = Hold.of(phase, self.planned.kernels_of("transformer", safe=True))
        stack = self.family.stack(self.source.transformer, hold.weight_format, self.dtype, hold.kernels)
        return self.transformer.with_template(stack.template)

    @property
    def encoder(self) -> PromptEncoder:
        """The prompt encoder; nothing of it is loaded before it encodes."""
        plan = self.planned
        phase = plan.phase("encode")
        if self._encoder is None:
            self._encoder = self.family.open_encoder(
                self.source,
                torch.device("cpu") if phase.device == "cpu" else self.device,
                self.dtype,
                Hold.of(phase, plan.kernels_of("text_encoder")),
                self._cache,
                alone="text_encoder" not in plan.kept_on_device,
                progress=self._progress,
            )
        return self._encoder

    def condition(
        self,
        prompt: str,
        negative: str | None,
        pictures: Sequence[Image.Image],
        template: str,
        check: Callable[[], None],
    ) -> tuple[Conditioning, bool]:
        """Prompt embeddings, from the cache if it has them; the encoder is read only when it does not.

        Args:
            prompt: what to make.
            negative: the second branch's prompt, or None.
            pictures: at the size at which the vision tower sees them.
            template: of the encoder.
            check: called before each layer; raises to stop the run.

        Returns:
            The conditioning, and whether it came from the cache.
        """
        encoder = self.encoder
        prompts = [prompt] if negative is None else [prompt, negative]
        key = encoder.key(prompts, pictures, template)
        known = self._conditioning.get(key)
        if known is not None:
            return known, True
        self.enter("encode")
        if not encoder.loaded:
            self.log.append("load text_encoder")
        elif encoder.tape is not None:
            _follow(encoder.tape, self.planned.phase("encode"))
        embeds = encoder.encode(prompts, pictures, template, check=check)
        made = Conditioning(embeds[0], embeds[1] if negative is not None else None, key)
        self._conditioning.put(made)
        return made, False

    def release(self, *, vram: bool = True, ram: bool = True) -> None:
        """Free weights on the device, and those in host memory.

        Args:
            vram: what lies on the device.
            ram: streamed slabs that lie in host memory.

        Raises:
            RequestError: host memory is to be freed under weights that stay on the device.
        """
        if not vram:
            if ram:
                raise RequestError("vram must be true where ram is, got false", hint="release() frees both")
            return
        for component in ("text_encoder", "transformer", "vae"):
            self.free(component, keep_host=not ram)
        if ram:
            self._encoder = None

    def rest(self) -> None:
        """Stop what is being copied ahead."""
        for component in ("text_encoder", "transformer"):
            tape = self.tape(component)
            if tape is not None and not tape.suspended:
                tape.rest()

    @property
    def planned(self) -> Plan:
        """The plan of the run under way."""
        if self.plan is None:
            raise RuntimeError("a run must be planned before a component is used")
        return self.plan


def _placement(phase: PhasePlan) -> Placement | None:
    return None if phase.blocks is None else phase.blocks.placement


def _follow(tape: Tape, phase: PhasePlan) -> None:
    """Bring a loaded tape onto the device, and stream what a plan streams beyond what it already does."""
    placement = _placement(phase)
    if placement is not None and tape.placement.host == placement.host:
        streamed = tuple(sorted({*tape.placement.streamed, *placement.streamed}))
        if streamed != tape.placement.streamed:
            slots = max(tape.placement.slots, placement.slots)
            tape.replace(replace(tape.placement, streamed=streamed, slots=slots))
    if tape.suspended:
        tape.resume()
