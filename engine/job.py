"""A request resolved against a model: every number fixed, every decision said, nothing computed yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .keep.options import Keep
from .picture import Picture
from .reference.options import Reference, StepReference
from .strength import actual_steps

if TYPE_CHECKING:
    from .given import Given


@dataclass(frozen=True)
class Geometry:
    """Size of a picture and of the token grid that carries it.

    Attributes:
        width: exact width in pixels.
        height: exact height in pixels.
        multiple: pixels per token side; the picture is padded up to it inside the engine and cropped after.
    """

    width: int
    height: int
    multiple: int

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns."""
        return -(-self.height // self.multiple), -(-self.width // self.multiple)

    @property
    def padded(self) -> tuple[int, int]:
        """(width, height) of the padded picture."""
        rows, columns = self.grid
        return columns * self.multiple, rows * self.multiple


@dataclass(frozen=True)
class Job:
    """Everything a run needs to know.

    Attributes:
        kind: ``edit`` or ``generate``.
        prompt: as asked.
        negative_prompt: the second branch's prompt, or None for one branch.
        pictures: the loaded input pictures; none where their latents are given.
        target: geometry of the output.
        references: geometry of every picture as the VAE sees it.
        conditions: (width, height) of every picture as the vision tower sees it.
        template: prompt template of the encoder.
        num_inference_steps: steps, as asked.
        true_cfg_scale: guidance scale; 1 for one branch.
        seed: seed of the noise.
        flow_shift: static shift or None.
        notes: decisions worth telling, one sentence each.
        reference: options of the references.
        table: what the references do in each step.
        masks: of the references, at the size of each picture; None where all of it is one.
        keep: options of what is kept.
        mask: of what is kept, white = change, at the size of the output.
        denoise: share of the schedule that is run, or None.
        resize_control: as asked.
        init: the loaded picture to start from, of a generation.
        guidance_scale: g of ``p + g (p - n)`` where the model is guided so, else None.
        cfg_normalization: longest guided velocity, in lengths of the prompt's; 0 for any.
        cfg_truncation: model time above which the prompt runs alone.
        schedule: how steps are counted, of a model that knows several ways.
        size_rule: as asked.
        given: parts that are encoded already.
    """

    kind: str
    prompt: str
    negative_prompt: str | None
    pictures: tuple[Picture, ...]
    target: Geometry
    references: tuple[Geometry, ...]
    conditions: tuple[tuple[int, int], ...]
    template: str
    num_inference_steps: int
    true_cfg_scale: float
    seed: int
    flow_shift: float | None
    notes: tuple[str, ...]
    reference: Reference = Reference()
    table: tuple[StepReference, ...] = ()
    masks: tuple[Picture | None, ...] = ()
    keep: Keep = Keep()
    mask: Picture | None = None
    denoise: float | None = None
    resize_control: str | None = None
    init: Picture | None = None
    guidance_scale: float | None = None
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0
    schedule: str | None = None
    size_rule: str | None = None
    given: Given | None = None

    @property
    def evaluations(self) -> int:
        """Network evaluations per branch of the whole schedule."""
        return self.num_inference_steps - (self.schedule == "official9")

    @property
    def start(self) -> int:
        """The first step that is run, counted in evaluations."""
        return 0 if self.denoise is None else self.evaluations - actual_steps(self.evaluations, self.denoise)

    @property
    def anchored(self) -> bool:
        """Clean latents of a picture are needed at the size of the output: of the one to start from, or the first."""
        return self.start > 0 or self.keep.rule is not None

    @property
    def steered(self) -> bool:
        """A step differs from what the model was trained for, by more than which pictures are there."""
        steps = self.table[min(self.start, self.evaluations - 1) :]
        usual = {"default", "concat", "cross_attn"}
        plain = all(step.method in usual and set(step.strengths) <= {0.0, 1.0} for step in steps)
        return self.anchored or not plain or any(self.masks)

    def cast(self, step: int) -> tuple[int, ...]:
        """Places of the pictures that the transformer sees in a step."""
        return self.table[step].present if self.table else ()

    def shown(self, cast: tuple[int, ...]) -> tuple[int, ...]:
        """Places of the pictures that the text encoder sees beside a cast; none where it has nothing to encode."""
        if self.given is not None and self.given.prompt_embeds is not None:
            return ()
        return tuple(range(len(self.references))) if self.reference.keep_vision_at_zero else cast

    @property
    def casts(self) -> tuple[tuple[int, ...], ...]:
        """The different casts of the steps that are run, in their order; at least one."""
        steps = range(min(self.start, self.evaluations - 1), self.evaluations)
        return tuple(dict.fromkeys(self.cast(step) for step in steps))

    def template_for(self, shown: tuple[int, ...]) -> str:
        """Prompt template where the text encoder sees these pictures: without any that of text alone."""
        return self.template if shown or not self.references else "text"

    def record(self) -> dict[str, Any]:
        """The resolved request as JSON values; a request made from it gives the same job."""
        guided = self.guidance_scale is not None
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "size": [self.target.width, self.target.height],
            "num_inference_steps": self.num_inference_steps,
            **({"guidance_scale": self.guidance_scale} if guided else {"true_cfg_scale": self.true_cfg_scale}),
            "seed": self.seed,
            "flow_shift": self.flow_shift,
            **self._steering(),
            **self._starting(),
        }

    def _steering(self) -> dict[str, Any]:
        """What was asked of references, keeping, start and sizes; nothing where nothing was."""
        masks = [_named(mask) for mask in self.masks]
        reference = self.reference.record() | ({"masks": masks} if any(masks) else {})
        keep = self.keep.record() | ({} if self.mask is None else {"mask": _named(self.mask)})
        said = {
            "reference": reference or None,
            "keep": keep or None,
            "denoise": self.denoise if self.kind == "edit" else None,
            "resize_control": self.resize_control,
        }
        return {name: value for name, value in said.items() if value is not None}

    def _starting(self) -> dict[str, Any]:
        """What was asked of the picture to start from, the schedule and guidance; nothing where nothing was."""
        said = {
            "init_image": _named(self.init),
            "strength": self.denoise if self.kind == "generate" else None,
            "schedule": self.schedule,
            "cfg_normalization": self.cfg_normalization or None,
            "cfg_truncation": None if self.cfg_truncation == 1 else self.cfg_truncation,
            "size_rule": self.size_rule,
            "given": None if self.given is None else self.given.key,
        }
        return {name: value for name, value in said.items() if value is not None}

    def key(self, surroundings: Mapping[str, str]) -> str:
        """Identity of the run: the resolved request, the pictures and the surroundings given."""
        content = [self.record(), [p.sha256 for p in self.pictures], dict(surroundings)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named(mask: Picture | None) -> dict[str, str] | None:
    return None if mask is None else {"path": mask.label, "sha256": mask.sha256}
