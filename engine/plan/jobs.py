"""What a plan knows of a request: grids and token counts, or bounds where only the tokenizer could tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import RequestError

if TYPE_CHECKING:
    from ..defaults import Defaults
    from ..given import Given
    from ..job import Job

Size = tuple[int, int]

LEADING_TOKENS = {"text": 34, "edit": 64, "edit-plus": 64, "z-image": 3}
"""Tokens of each prompt template before the pictures and the prompt."""

KEPT = frozenset({"z-image"})
"""Templates whose leading tokens are part of the conditioning."""

END_TOKENS = 8
PICTURE_TOKENS = 12
MAX_PROMPT_TOKENS = {"text": 1024, "edit": 1024, "edit-plus": 1024, "z-image": 509}
"""Longest prompt with the end of its template; Z-Image's whole chat has 512."""

EDIT_AREA_RATIO = 1.0


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """A request in numbers.

    Attributes:
        kind: ``edit`` or ``generate``.
        target: token rows and columns of the output.
        references: token rows and columns of every picture as the VAE sees it.
        patches: rows and columns of every picture's patches in the vision tower.
        prompt_tokens: per branch, tokens of the whole chat, image tokens included; an upper bound.
        shared_tokens: tokens that all branches certainly begin with.
        dropped_tokens: leading tokens that are no part of the conditioning.
        steps: denoising steps.
        dtype: compute dtype, ``auto``, ``float32`` or ``bfloat16``.
        rcm: the region of change is found while the run goes on.
        words: the request as it is typed, for the line to paste.
        notes: what was assumed.
        encoded: token rows and columns of pictures that the VAE sees beside the references.
        casts: how many different sets of pictures the steps see.
        steered: references weigh otherwise than trained, or a part of the picture is kept.
        given_tokens: per branch, tokens of conditioning that comes with the request; none where it is all encoded.
        encodes: something is left to encode.
        only: the phases that are run; all of them where empty.
    """

    kind: str
    target: Size
    references: tuple[Size, ...] = ()
    patches: tuple[Size, ...] = ()
    prompt_tokens: tuple[int, ...]
    shared_tokens: int
    dropped_tokens: int
    steps: int
    dtype: str = "auto"
    rcm: bool = False
    words: str = ""
    notes: tuple[str, ...] = ()
    encoded: tuple[Size, ...] = ()
    casts: int = 1
    steered: bool = False
    only: tuple[str, ...] = ()
    given_tokens: tuple[int, ...] = ()
    encodes: bool = True

    @property
    def branches(self) -> int:
        """Forward passes per step."""
        return len(self.prompt_tokens)

    @property
    def target_tokens(self) -> int:
        """Image tokens of the output."""
        return self.target[0] * self.target[1]

    @property
    def reference_tokens(self) -> int:
        """Image tokens of all references."""
        return sum(rows * columns for rows, columns in self.references)

    @property
    def text_tokens(self) -> tuple[int, ...]:
        """Per branch, tokens of the conditioning."""
        return self.given_tokens or tuple(count - self.dropped_tokens for count in self.prompt_tokens)

    @property
    def latent_sizes(self) -> tuple[Size, ...]:
        """Rows and columns of latents: the target, then the references and what else is encoded."""
        return tuple((2 * rows, 2 * columns) for rows, columns in (self.target, *self.references, *self.encoded))

    @classmethod
    def of(cls, job: Job, processor: Mapping[str, Any], *, dtype: str = "auto", words: str = "") -> JobFacts:
        """Facts of a resolved request: of all pictures that any step sees, so that no step needs more.

        Args:
            job: the request against its model.
            processor: settings of the image processor.
            dtype: compute dtype.
            words: the request as it is typed.
        """
        prompts = [job.prompt] if job.negative_prompt is None else [job.prompt, job.negative_prompt]
        casts = job.casts
        seen = sorted({place for cast in casts for place in cast})
        shown = sorted({place for cast in casts for place in job.shown(cast)})
        known = 0 in seen and job.references[0] == job.target
        made = cls.build(
            kind=job.kind,
            template=job.template_for(tuple(shown)),
            prompts=prompts,
            target=job.target.grid,
            references=[job.references[place].grid for place in seen],
            conditions=[job.conditions[place] for place in shown],
            processor=processor,
            steps=job.num_inference_steps,
            dtype=dtype,
            rcm=job.keep.rule == "rcm",
            words=words,
            encoded=(job.target.grid,) if job.anchored and not known else (),
            casts=len(casts),
            steered=job.steered,
        )
        return made if job.given is None else _with_given(made, job.given)

    @classmethod
    def build(  # noqa: PLR0913  one argument per field, all by name
        cls,
        *,
        template: str,
        prompts: Sequence[str],
        conditions: Sequence[Size],
        processor: Mapping[str, Any],
        references: Sequence[Size],
        **fields: Any,
    ) -> JobFacts:
        """Facts from sizes and texts.

        A byte-level tokenizer makes at most one token of a byte, so the bytes of a prompt bound its tokens.

        Args:
            template: name of the prompt template.
            prompts: one per branch.
            conditions: (width, height) of every picture as the encoder gets it.
            processor: settings of the image processor.
            references: token grids of the pictures as the VAE sees them.
            fields: the remaining fields.
        """
        patches = tuple(patch_grid(width, height, processor) for width, height in conditions)
        image_tokens = sum(rows * columns // processor["merge_size"] ** 2 for rows, columns in patches)
        leading = LEADING_TOKENS[template]
        lengths = [min(MAX_PROMPT_TOKENS[template], len(prompt.encode()) + END_TOKENS) for prompt in prompts]
        labels = PICTURE_TOKENS * len(patches)
        return cls(
            patches=patches,
            references=tuple(references),
            prompt_tokens=tuple(leading + labels + image_tokens + length for length in lengths),
            shared_tokens=leading + image_tokens,
            dropped_tokens=0 if template in KEPT else leading,
            **fields,
        )


def _with_given(facts: JobFacts, given: Given) -> JobFacts:
    """The same request with conditioning that is encoded already, as far as it is."""
    embeds = [given.prompt_embeds, given.negative_embeds][: facts.branches]
    if embeds[0] is None:
        return facts
    lengths = [bound if made is None else len(made) for made, bound in zip(embeds, facts.text_tokens, strict=True)]
    return replace(facts, given_tokens=tuple(lengths), encodes=any(made is None for made in embeds))


def patch_grid(width: int, height: int, processor: Mapping[str, Any]) -> Size:
    """Rows and columns of patches that the image processor cuts a picture into.

    Both sides are rounded to whole merge blocks, then scaled into ``min_pixels .. max_pixels``.

    Source: huggingface/transformers:src/transformers/models/qwen2_vl/image_processing_qwen2_vl.py (smart_resize).
    """
    unit = processor["patch_size"] * processor["merge_size"]
    rows, columns = round(height / unit), round(width / unit)
    area = rows * columns * unit * unit
    if area > processor["max_pixels"]:
        shrink = (height * width / processor["max_pixels"]) ** 0.5
        rows, columns = max(1, int(height / shrink / unit)), max(1, int(width / shrink / unit))
    elif area < processor["min_pixels"]:
        grow = (processor["min_pixels"] / (height * width)) ** 0.5
        rows, columns = -int(-height * grow // unit), -int(-width * grow // unit)
    return rows * processor["merge_size"], columns * processor["merge_size"]


def area_size(area: int, ratio: float, multiple: int = 32) -> Size:
    """(width, height) of about ``area`` pixels with ``ratio`` = width / height, both multiples of ``multiple``."""
    width = (area * ratio) ** 0.5
    return max(1, round(width / multiple)) * multiple, max(1, round(width / ratio / multiple)) * multiple


def tokens(size: Size, multiple: int) -> Size:
    """Token rows and columns of a picture of (width, height) pixels, padded up to whole tokens."""
    width, height = size
    return -(-height // multiple), -(-width // multiple)


def foresee(
    defaults: Defaults,
    pictures: Sequence[Size],
    fields: Mapping[str, Any],
    processor: Mapping[str, Any],
    *,
    multiple: int,
    **rest: Any,
) -> JobFacts:
    """Facts of a request that is not resolved yet, from the sizes of its pictures; reads nothing.

    Args:
        defaults: the model's.
        pictures: (width, height) of every picture; none stands for one square picture where the model needs one.
        fields: fields of the request, as far as they are given, and ``init_size``, (width, height) of a picture to
            start from.
        processor: settings of the image processor.
        multiple: pixels per token side.
        rest: ``dtype`` and ``words``.

    Raises:
        RequestError: the model does not take that many pictures.
    """
    notes = []
    most = defaults.max_references
    if not pictures and most != 0:
        side = round(defaults.area_pixels**0.5)
        pictures = [(side, side)]
        notes.append("no picture was given: the plan is for one square picture (name yours with --ref)")
    if most is not None and len(pictures) > most:
        raise RequestError(f"this model must get at most {most} picture(s), got {len(pictures)}")
    if fields.get("prompt") is None:
        notes.append("no prompt was given: the plan is for one of at most 256 tokens")
    prompt = fields.get("prompt") or "x" * 248
    negative = fields.get("negative_prompt") or defaults.negative_prompt
    ratios = [width / height for width, height in pictures]
    size, start = fields.get("size"), fields.get("init_size")
    if size is None and start is not None:
        fits = start[0] * start[1] <= defaults.area_pixels
        size = start if fits else area_size(defaults.area_pixels, start[0] / start[1], multiple)
    if size is None:
        lead = ratios[-1 if defaults.size_from_last else 0] if ratios else EDIT_AREA_RATIO
        size = area_size(defaults.area_pixels, lead)
    seen = defaults.reference_area_pixels
    return JobFacts.build(
        kind="edit" if pictures else "generate",
        template=defaults.template,
        prompts=[prompt, negative] if _is_guided(defaults, fields) else [prompt],
        target=tokens(size, multiple),
        references=[tokens(size if seen is None else area_size(seen, ratio), multiple) for ratio in ratios],
        conditions=[area_size(defaults.condition_area_pixels, ratio) for ratio in ratios],
        processor=processor,
        steps=fields.get("num_inference_steps") or defaults.num_inference_steps,
        notes=tuple(notes),
        encoded=() if start is None else (tokens(size, multiple),),
        **rest,
    )


def _is_guided(defaults: Defaults, fields: Mapping[str, Any]) -> bool:
    """Whether steps run the negative prompt too: at a scale above 1, or above 0 where the model counts it so."""
    given = fields.get("guidance_scale")
    if defaults.guidance_scale is not None:
        return (defaults.guidance_scale if given is None else given) > 0
    return (fields.get("true_cfg_scale") or max(1.0, given or defaults.true_cfg_scale)) != 1
