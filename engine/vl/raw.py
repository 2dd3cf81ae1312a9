"""Raw hidden states with what is needed to understand them; every knob is applied later, without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...errors import RequestError
from .knobs import Selection

TEXT_BEFORE, START, IMAGE, END, TEXT_AFTER = range(5)
_KIND_BITS = 3
MAX_IMAGES = 1 << (8 - _KIND_BITS)


@dataclass(frozen=True)
class Seen:
    """A picture as it was given.

    Attributes:
        sha256: of its file; of mode, size and pixels where it was handed over in memory.
        width: in pixels, before it was brought to the patches that ``grid_thw`` counts.
        height: in pixels, likewise.
    """

    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class RawExtraction:
    """Hidden states before selection, masking and normalisation, on the CPU.

    Attributes:
        hidden: layer (-1, -2, ...) to tensor [S, D] in the dtype of computation.
        input_ids: int32 [S].
        segments: uint8 [S]; the low 3 bits say what a row is (0 text before, 1 vision start, 2 image, 3 vision end, 4
            text after or between), the high 5 bits the number of its picture.
        grid_thw: frames, rows and columns of patches of each picture, int32 [n, 3].
        prompt: the whole chat with one image token per row.
        text: the description that was given with the pictures, or None.
        system_prompt: or None.
        variant: ``instruct`` or ``thinking``.
        think_block: the chat ends with an empty think block.
        pictures: what was looked at.
        masked: image tokens that no other token saw, counted over all pictures before any was removed.
    """

    hidden: Mapping[int, torch.Tensor]
    input_ids: torch.Tensor
    segments: torch.Tensor
    grid_thw: torch.Tensor
    prompt: str
    text: str | None = None
    system_prompt: str | None = None
    variant: str = "instruct"
    think_block: bool = False
    pictures: tuple[Seen, ...] = ()
    masked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows = {len(self.input_ids), len(self.segments), *(len(states) for states in self.hidden.values())}
        if len(rows) != 1 or any(states.dim() != 2 for states in self.hidden.values()):
            raise RequestError(
                f"hidden states must be matrices of one row per token, got {len(self.input_ids)} tokens, "
                f"{len(self.segments)} segments and {[list(states.shape) for states in self.hidden.values()]}"
            )

    @property
    def kinds(self) -> torch.Tensor:
        """What each row is, uint8 [S]."""
        return self.segments & ((1 << _KIND_BITS) - 1)

    @property
    def images(self) -> torch.Tensor:
        """The number of each row's picture, uint8 [S]; 0 for text."""
        return self.segments >> _KIND_BITS

    def rows(self, selection: Selection) -> torch.Tensor:
        """Which rows a selection keeps, bool [S].

        Raises:
            RequestError: pictures' rows are asked where there is no picture.
        """
        kinds = self.kinds
        if selection == "all":
            return torch.ones(len(kinds), dtype=torch.bool)
        image = kinds == IMAGE
        span = image | (kinds == START) | (kinds == END)
        if selection != "text" and not bool(image.any()):
            raise RequestError(f"token_selection {selection} must have image tokens to keep, got a chat without any")
        return {"image": span, "image_no_markers": image, "text": ~span}[selection]


def segment_rows(input_ids: torch.Tensor, start: int, image: int, end: int) -> torch.Tensor:
    """What each token is and to which picture it belongs, see :class:`RawExtraction`.

    Args:
        input_ids: [S].
        start: token id of the vision start.
        image: token id of an image row.
        end: token id of the vision end.

    Raises:
        RequestError: spans are not closed in order, or there are more than 32.
    """
    ids = input_ids.cpu()
    starts, ends = (ids == start).nonzero().flatten(), (ids == end).nonzero().flatten()
    paired = len(starts) == len(ends) and bool((starts < ends).all()) and bool((ends[:-1] < starts[1:]).all())
    if not paired or len(starts) > MAX_IMAGES:
        raise RequestError(
            f"vision markers must come in pairs, at most {MAX_IMAGES}, got {len(starts)} starts and {len(ends)} ends"
        )
    segments = torch.full((len(ids),), TEXT_AFTER, dtype=torch.uint8)
    segments[: int(starts[0]) if len(starts) else len(ids)] = TEXT_BEFORE
    for number, (first, last) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        inside = ids[first + 1 : last]
        if bool((inside != image).any()):
            raise RequestError(f"tokens between vision markers must be image tokens {image}, got others")
        high = number << _KIND_BITS
        segments[first], segments[first + 1 : last], segments[last] = START | high, IMAGE | high, END | high
    return segments
