"""What must hold between the parts of a job, when it is written and when it is read."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...errors import InputError
from ..vl import RawExtraction
from ..vl.raw import END, IMAGE, MAX_IMAGES, START, TEXT_AFTER
from .job import AGAIN, JobFile

MAX_ROWS = 1 << 17
MAX_TEXT_ROWS = 1 << 14
FLOATS = (torch.float32, torch.bfloat16)
PATCH_STEP_PIXELS = 16
"""How far a latent may reach beyond the picture: sides are brought to multiples of this."""
LATENT_SCALE = 8


def verify(job: JobFile, name: str = "job") -> None:
    """Check types, shapes, finite values and counts.

    Raises:
        InputError: something does not hold.
    """
    for rule, holds in _rules(job):
        if not holds:
            raise InputError(f"{name}: {rule}", hint=AGAIN)


def _rules(job: JobFile) -> Iterable[tuple[str, bool]]:
    yield f"kind must be z-image or qwen-image-edit, got {job.kind!r}", job.kind in ("z-image", "qwen-image-edit")
    yield "a job must hold hidden states or encoded parts, got none", bool(job.tensors)
    texts = (job.prompt, job.negative_prompt)
    yield "prompts must be text", all(text is None or isinstance(text, str) for text in texts)
    yield "hidden states must come with z-image, got another kind", job.raw is None or job.kind == "z-image"
    if job.raw is not None:
        yield from _raw_rules(job.raw)
    yield from _given_rules(job)


def _raw_rules(raw: RawExtraction) -> Iterable[tuple[str, bool]]:
    states = list(raw.hidden.values())
    yield "hidden states must be of one layer at least, got none", bool(states)
    yield "hidden states must be of one width and dtype", len({(each.shape[1], each.dtype) for each in states}) == 1
    yield f"hidden states must be float32 or bfloat16, got {states[0].dtype}", states[0].dtype in FLOATS
    rows, width = states[0].shape
    yield (
        f"hidden states must have 1 to {MAX_ROWS} rows and a width, got {rows} of {width}",
        (0 < rows <= MAX_ROWS and width > 0),
    )
    yield "hidden states must be finite, got NaN or infinity", all(bool(each.isfinite().all()) for each in states)
    types = raw.input_ids.dtype == torch.int32 and raw.segments.dtype == torch.uint8
    yield "vl.input_ids must be int32 and vl.segment uint8, one per row", types and raw.input_ids.dim() == 1
    yield "vl.input_ids must not be negative", bool((raw.input_ids >= 0).all())
    grid = raw.grid_thw
    yield (
        "vl.grid_thw must be int32 [n, 3] of even numbers of patches",
        (grid.dtype == torch.int32 and grid.dim() == 2 and grid.shape[1] == 3 and bool(_even(grid).all())),
    )
    yield from _segment_rules(raw)


def _even(grid: torch.Tensor) -> torch.Tensor:
    return (grid[:, 0] == 1) & (grid[:, 1:] > 0).all(dim=1) & (grid[:, 1:] % 2 == 0).all(dim=1)


def _segment_rules(raw: RawExtraction) -> Iterable[tuple[str, bool]]:
    count = len(raw.grid_thw)
    yield f"pictures must be at most {MAX_IMAGES}, got {count}", count <= MAX_IMAGES
    yield f"pictures must be {count} as in vl.grid_thw, got {len(raw.pictures)}", len(raw.pictures) == count
    yield "vl.segment must hold kinds 0 to 4", bool((raw.kinds <= TEXT_AFTER).all())
    inside = (raw.kinds >= START) & (raw.kinds <= END)
    numbers = raw.images[inside]
    yield f"vl.segment must name pictures below {count}", not numbers.numel() or int(numbers.max()) < count
    whole = [int(rows) * int(columns) // 4 for _, rows, columns in raw.grid_thw.tolist()]
    found = [int(((raw.kinds == IMAGE) & (raw.images == number)).sum()) for number in range(count)]
    left = _left(whole, raw.masked)
    yield f"image tokens must be {whole} as vl.grid_thw says, got {found}", found in (whole, left)
    for kind, word in ((START, "start"), (END, "end")):
        marks = [int(((raw.kinds == kind) & (raw.images == number)).sum()) for number in range(count)]
        yield f"each picture must have one {word} marker, got {marks}", marks == [1] * count


def _left(whole: list[int], masked: tuple[int, ...]) -> list[int]:
    """Image tokens of each picture where the masked ones were left out."""
    left, first = [], 0
    for tokens in whole:
        left.append(tokens - sum(first <= each < first + tokens for each in masked))
        first += tokens
    return left


def _given_rules(job: JobFile) -> Iterable[tuple[str, bool]]:
    given = job.given
    embeds = [each for each in (given.prompt_embeds, given.negative_embeds) if each is not None]
    latents = [*given.references, *([] if given.init is None else [given.init])]
    yield "encoded parts must be float32 or bfloat16", all(each.dtype in FLOATS for each in (*embeds, *latents))
    yield f"embeddings must have at most {MAX_TEXT_ROWS} rows", all(len(each) <= MAX_TEXT_ROWS for each in embeds)
    widths = {each.shape[1] for each in embeds}
    widths |= set() if job.raw is None else {each.shape[1] for each in job.raw.hidden.values()}
    yield f"embeddings of prompt and pictures must be of one width, got {sorted(widths)}", len(widths) <= 1
    yield "encoded parts must come with the fingerprint of their model", not given.tensors or "fingerprint" in job.model
    yield "embeddings must come with their prompt, got none", given.prompt_embeds is None or job.prompt is not None
    shapes = {(each.shape[0], each.shape[2]) for each in latents}
    yield f"latents must be of one picture and one frame each, got {sorted(shapes)}", shapes <= {(1, 1)}
    yield (
        f"latents must be of one depth, got {[each.shape[1] for each in latents]}",
        (len({each.shape[1] for each in latents}) <= 1),
    )
    behind = len(given.references) or len(latents)
    yield f"pictures must be {behind} behind the latents, got {len(job.pictures)}", len(job.pictures) == behind
    if given.init is not None and given.size is not None:
        sides = [side * LATENT_SCALE for side in given.init.shape[:-3:-1]]
        over = [have - want for have, want in zip(sides, given.size, strict=True)]
        yield (
            f"init must be of {given.size[0]}x{given.size[1]} pixels, got {sides[0]}x{sides[1]}",
            (all(0 <= each < PATCH_STEP_PIXELS for each in over)),
        )
