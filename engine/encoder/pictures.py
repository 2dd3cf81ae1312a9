"""Pictures to the patches that the vision tower takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, InputError

if TYPE_CHECKING:
    from PIL import Image

MAX_ASPECT = 200
_PROCESSORS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")


@dataclass(frozen=True)
class Patches:
    """The patches of all pictures, one picture after the other.

    Attributes:
        values: normalised pixels [patches, channels * frames * height * width], float32; merge blocks are contiguous.
        grids: rows and columns of patches, one pair per picture.
        merge_size: patches per side of a merge block, which becomes one token.
    """

    values: torch.Tensor
    grids: tuple[tuple[int, int], ...]
    merge_size: int

    @property
    def merged_grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of tokens, one pair per picture."""
        return tuple((rows // self.merge_size, columns // self.merge_size) for rows, columns in self.grids)

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Image tokens of each picture."""
        return tuple(rows * columns for rows, columns in self.merged_grids)


def cut_patches(pictures: Sequence[Image.Image], config: Mapping[str, Any]) -> Patches:
    """Resize, normalise and cut pictures with the processor that the model brings.

    Args:
        pictures: at least one.
        config: ``preprocessor_config.json`` of the model.

    Raises:
        CheckpointError: the processor is of another kind.
        InputError: a picture is more than 200 times as long as it is wide, which the processor cannot resize.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    kind = config.get("image_processor_type", _PROCESSORS[0])
    if kind not in _PROCESSORS:
        raise CheckpointError(f"image processor must be {_PROCESSORS[0]}, got {kind}")
    for number, picture in enumerate(pictures, start=1):
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise InputError(
                f"picture {number} must be at most {MAX_ASPECT} times as long as it is wide, "
                f"got {picture.width}x{picture.height}"
            )
    processor: Any = Qwen2VLImageProcessorPil.from_dict(copy.deepcopy(dict(config)))
    made = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
    grids = tuple((int(rows), int(columns)) for _, rows, columns in made["image_grid_thw"].tolist())
    return Patches(made["pixel_values"], grids, processor.merge_size)
