"""An extractor under ceilings: planned before it loads, kept below its ceiling, and made smaller where that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...errors import PlanError
from ...loaders.vl import VLSource, open_vl
from ..ceiling import Ceiling, make_ceiling
from ..components import pick_device, pick_dtype
from ..ladder import Ladder
from ..measure import device_facts
from ..picture import load_picture
from ..places import default_cache
from ..plan import Budget, Choices, Extraction, ExtractorFacts, ExtractorPlan, plan_extraction
from ..stack import Hold
from ..stack.pack import Progress
from .encoder import Picture, VLEncoder
from .extractor import VLEmbeddingExtractor
from .knobs import Knobs
from .masking import MaskMode
from .raw import RawExtraction


class PlannedExtractor(VLEmbeddingExtractor):
    """A :class:`VLEmbeddingExtractor` whose every pass is planned under ceilings.

    The hidden states are those of an extractor without ceilings, to the bit: placement changes nothing, and the kernels
    are the same.

    Args:
        source: the opened model.
        device: where it runs.
        dtype: compute dtype.
        budget: ceilings; None takes what is free at each pass, less a margin.
        weight_format: ``bf16``, ``int8`` or ``fp8`` for the decoder layers.
        offload: as of :class:`engine.plan.Choices`.
        cache: folder of packed files.
        progress: called while the layers are packed.

    Attributes:
        plan: of the latest pass.
        told: what the ladder did, one sentence per retry.
        log: ``load extractor`` and ``free extractor``, in order, as ``Components.log`` of an engine.
    """

    def __init__(
        self,
        source: VLSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        budget: Budget | None = None,
        weight_format: str = "bf16",
        offload: str = "auto",
        cache: Path | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self._device, self._dtype, self._budget = device, dtype, budget or Budget()
        self._cache, self._progress = cache or default_cache(), progress
        self._choices = Choices(text_encoder_weights=weight_format, offload=offload)
        self._facts = ExtractorFacts.of(source)
        self._ceiling: Ceiling | None = None
        self.plan: ExtractorPlan | None = None
        self.told: list[str] = []
        self.log: list[str] = []
        super().__init__(self._encoder(source, Hold(weight_format), alone=False))

    def raw(  # noqa: PLR0913 (the options by name)
        self,
        images: Picture | Sequence[Picture],
        text: str | None = None,
        layers: Sequence[int] = (Knobs.hidden_layer,),  # pyright: ignore[reportArgumentType]
        *,
        system_prompt: str | None = None,
        think_block: bool = False,
        mask_tokens: Sequence[int] = (),
        mask_mode: MaskMode = "attention",
        check: Callable[[], None] | None = None,
    ) -> RawExtraction:
        """See :meth:`VLEmbeddingExtractor.raw`.

        Raises:
            PlanError: the ceilings cannot be met; the message says the least that would do.
            MemoryLadderError: memory ran out after every retry.
        """
        job, plan = self._plan_of(images, text, layers, system_prompt=system_prompt, masked=bool(mask_tokens))
        self._follow(plan)
        ladder = Ladder(self, self._limit(plan))
        work = super().raw

        def extract() -> RawExtraction:
            self.log += [] if self._unloaded or self.encoder.loaded else ["load extractor"]
            return work(
                images,
                text,
                layers,
                system_prompt=system_prompt,
                think_block=think_block,
                mask_tokens=mask_tokens,
                mask_mode=mask_mode,
                check=check,
            )

        try:
            return ladder.climb("extract", extract, lambda: self._leaner(job, plan))
        finally:
            self.told += ladder.notes

    def unload(self) -> None:
        """Free all weights for good."""
        self.log += ["free extractor"] if self.encoder.loaded else []
        super().unload()

    def shrink(self, phase: str) -> str:
        """Make room after an out-of-memory error: free the tower, then stream half of the layers that are resident.

        Returns:
            What was done, for the notes.
        """
        encoder, tape = self.encoder, self.tape
        encoder.release_vision()
        streamed = ""
        if tape is not None:
            resident = len(tape) - len(tape.placement.streamed)
            try:
                if not resident or tape.placement.host == "mapped":
                    encoder.release()
                else:
                    tape.demote(-(-resident // 2))
                    streamed = f", {len(tape.placement.streamed)} of {len(tape)} layers streamed"
            except (RuntimeError, MemoryError):
                encoder.release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return f"{phase} ran out of memory and is tried again{streamed}"

    def release(self) -> None:
        """Free all weights; the next pass reads them again."""
        self.encoder.release()

    def _plan_of(
        self,
        images: Picture | Sequence[Picture],
        text: str | None,
        layers: Sequence[int],
        *,
        system_prompt: str | None = None,
        masked: bool = False,
    ) -> tuple[Extraction, ExtractorPlan]:
        job = Extraction.foresee(
            self._facts,
            _sizes(images),
            text=text,
            system_prompt=system_prompt,
            layers=[layer for layer in layers if -self.layers <= layer <= -1] or [-1],
            masked=masked,
            dtype=str(self._dtype).removeprefix("torch."),
        )
        return job, plan_extraction(self._facts, job, self._budget, device_facts(self._device), self._choices)

    def _follow(self, plan: ExtractorPlan) -> None:
        """Hold the layers as planned: anew where what is held is of fewer layers, or was planned to take more."""
        before, self.plan = self.plan, plan
        hold = Hold(plan.formats.encoder, _blocks(plan).placement)
        kept = before is not None and before.alone == plan.alone and before.depth >= plan.depth
        if kept and before is not None and _blocks(before).device_bytes <= _blocks(plan).device_bytes:
            self.plan = replace(plan, depth=before.depth)
            return
        self.encoder.release()
        counters = self.encoder.counters
        self.encoder = self._encoder(self.source, hold, alone=plan.alone)
        self.encoder.counters = counters

    def _encoder(self, source: VLSource, hold: Hold, *, alone: bool) -> VLEncoder:
        return VLEncoder(
            source, self._device, self._dtype, hold=hold, cache=self._cache, alone=alone, progress=self._progress
        )

    def _limit(self, plan: ExtractorPlan) -> Ceiling:
        if self._ceiling is None:
            limit = plan.ceilings.vram_bytes if self._budget.vram_bytes is not None else None
            self._ceiling = make_ceiling(self._device, limit, plan.device.context_bytes)
        return self._ceiling

    def _leaner(self, job: Extraction, plan: ExtractorPlan) -> str:
        """A line to paste that needs less than the plan that failed."""
        leaner = replace(self._choices, offload="sequential")
        try:
            found = plan_extraction(self._facts, job, self._budget, plan.device, leaner)
        except PlanError:
            found = plan
        if found.vram_bytes < plan.vram_bytes:
            return f"{found.command} --offload sequential"
        needed = plan.vram_bytes + plan.vram_bytes // 16
        return f"give at least {needed / 2**30:.2f} GiB (--vram), or a smaller picture"


def open_planned(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> PlannedExtractor:
    """Open a Qwen3-VL folder under ceilings; ``options`` are those of :class:`PlannedExtractor`.

    Raises:
        CheckpointError: the folder holds no usable Qwen3-VL.
        DeviceError: CUDA is asked and not there.
        RequestError: device, dtype or format is not one of these.
    """
    chosen = pick_device(device)
    return PlannedExtractor(open_vl(path), chosen, pick_dtype(dtype, chosen), **options)


def _blocks(plan: ExtractorPlan) -> Any:
    blocks = plan.phase("read").blocks
    if blocks is None:
        raise PlanError("a plan of an extraction must place its layers, got none")
    return blocks


def _sizes(images: Picture | Sequence[Picture]) -> list[tuple[int, int]]:
    single = isinstance(images, str | bytes | Path) or not isinstance(images, Sequence)
    given: Sequence[Any] = [images] if single else list(images)  # pyright: ignore[reportArgumentType]
    return [load_picture(each).image.size for each in given]
