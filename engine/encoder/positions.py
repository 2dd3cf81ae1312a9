"""Three-dimensional rotary positions of a sequence of text and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import KernelError


def mrope_positions(tokens: torch.Tensor, image_token: int, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Time, row and column of every token.

    A text token stands at ``(p, p, p)`` and moves ``p`` on by 1. A picture of ``h x w`` merged patches that begins at
    ``p`` has ``(p, p + row, p + column)`` and moves ``p`` on by ``max(h, w)``, however many tokens it has.

    Args:
        tokens: token ids [T].
        image_token: the id that stands for one merged patch.
        grids: rows and columns of merged patches, one pair per picture in order.

    Returns:
        int64 tensor [3, T].

    Raises:
        KernelError: the image tokens are not those that the grids need.

    Source: Qwen2-VL (arXiv:2409.12191), section 2.1; transformers computes it only when it is given token types.
    """
    is_image = (tokens.cpu() == image_token).tolist()
    pieces: list[torch.Tensor] = []
    start, index, remaining = 0, 0, list(grids)
    while index < len(is_image):
        end = index
        if is_image[index]:
            if not remaining:
                raise KernelError(f"image tokens must belong to {len(grids)} pictures, got more at token {index}")
            rows, columns = remaining.pop(0)
            end = index + rows * columns
            pieces.append(_grid(rows, columns) + start)
            start += max(rows, columns)
        else:
            while end < len(is_image) and not is_image[end]:
                end += 1
            pieces.append(torch.arange(start, start + end - index).expand(3, -1))
            start += end - index
        if end > len(is_image) or any(flag != is_image[index] for flag in is_image[index:end]):
            raise KernelError(f"picture at token {index} must have {end - index} image tokens, got fewer")
        index = end
    if remaining:
        raise KernelError(f"image tokens must belong to {len(grids)} pictures, got {len(grids) - len(remaining)}")
    return torch.cat(pieces, dim=1) if pieces else torch.empty(3, 0, dtype=torch.int64)


def _grid(rows: int, columns: int) -> torch.Tensor:
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    return torch.stack([torch.zeros_like(row), row, column])
