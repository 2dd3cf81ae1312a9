"""What a run does to keep a part of the picture: step by step, at its end, and on the decoded picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...errors import RequestError
from ..latents import unpack
from .options import Keep
from .pixels import blend, feather, pixel_mask, token_mask
from .rules import changed_region, musubi_mask, scale_of, threshold_of

if TYPE_CHECKING:
    from ..job import Geometry


@dataclass(frozen=True)
class Keeper:
    """One run's fixed parts of what is kept; every method follows from its arguments alone.

    So a step can be tried again and a run resumed: the change masks are found anew from the latents and the velocity.

    Attributes:
        keep: the options.
        target: geometry of the output.
        control: clean latents of the first picture, packed, float32 [1, tokens, 4z].
        noise: that the run started from, as the control.
        sigmas: noise levels, one more than there are steps.
        original: the first picture, RGB, of the size of the output.
        mask: 0 to 255 [height, width], 255 = change, where the rule is a mask.
        tokens: the mask's shares per token, float32 [rows, columns].
        scale: standard deviation of the control.
        implementation: of ``kernels.rcm``.
    """

    keep: Keep
    target: Geometry
    control: torch.Tensor
    noise: torch.Tensor
    sigmas: tuple[float, ...]
    original: Image.Image
    mask: NDArray[np.uint8] | None
    tokens: torch.Tensor | None
    scale: float
    implementation: str

    @classmethod
    def of(
        cls,
        keep: Keep,
        *,
        mask_image: Image.Image | None,
        control: torch.Tensor,
        noise: torch.Tensor,
        target: Geometry,
        sigmas: Sequence[float],
        original: Image.Image,
        implementation: str = "reference",
    ) -> Keeper | None:
        """The keeper of a run, or None where nothing is kept.

        Args:
            keep: the options.
            mask_image: mode L, of the size of the output, where the rule is a mask; all black keeps everything.
            control: clean latents of the first picture, packed [1, tokens, 4z], on any device.
            noise: initial noise, packed, float32, where the run is.
            target: geometry of the output.
            sigmas: noise levels, the last one 0.
            original: the first picture at the size of the output.
            implementation: of ``kernels.rcm``; used by our rule.

        Raises:
            RequestError: the control has another token grid, or a picture another size than the output.
        """
        if keep.rule is None:
            return None
        rows, columns = target.grid
        if control.shape != noise.shape or control.shape[1] != rows * columns:
            raise RequestError(
                f"the first picture must have {rows}x{columns} tokens as the output has, got {control.shape[1]}",
                hint="--resize-control image",
            )
        for image in (original, mask_image) if keep.rule == "mask" else (original,):
            if image is None or image.size != (target.width, target.height):
                got = "none" if image is None else f"{image.width}x{image.height}"
                raise RequestError(f"original and mask must be {target.width}x{target.height}, got {got}")
        masked = mask_image if keep.rule == "mask" else None
        control = control.to(noise.device, torch.float32)
        return cls(
            keep=keep,
            target=target,
            control=control,
            noise=noise,
            sigmas=tuple(float(sigma) for sigma in sigmas),
            original=original,
            mask=None if masked is None else np.asarray(masked.convert("L")),
            tokens=None if masked is None else token_mask(masked, target, keep.mask_sampling).to(noise.device),
            scale=scale_of(control),
            implementation=implementation,
        )

    def before_step(
        self, index: int, latents: torch.Tensor, velocity: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``m x + (1 - m) c``, ``c = (1 - sigma) control + sigma noise``: what the Euler step is to start from.

        For after the velocity was computed, and before the step. The change masks start at step 1: at step 0 the
        latents are the control's noise everywhere.

        Args:
            index: of the step.
            latents: packed float32 [1, tokens, 4z]; not changed.
            velocity: as latents.

        Returns:
            (latents, m float32 [rows, columns]); m is None where nothing was kept.
        """
        if index == 0 and self.tokens is None:
            return latents, None
        sigma = self.sigmas[index]
        mask = self._mask(latents, velocity, sigma)
        return _mix(latents, self._noisy(sigma), mask), mask

    def finish(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``m x + (1 - m) control`` after the last step: what is kept has the latents of the picture, to the bit.

        A change mask is found once more, without noise.

        Args:
            latents: packed float32 [1, tokens, 4z]; not changed.

        Returns:
            (latents, m float32 [rows, columns]); the latents as they came and None where ``composite`` is "none".
        """
        if self.keep.put_back == "none":
            return latents, None
        mask = self._mask(latents, torch.zeros_like(latents), 0.0)
        return _mix(latents, self.control, mask), mask

    def composite(self, image: Image.Image, mask: torch.Tensor | None) -> Image.Image:
        """The original's pixels wherever nothing was to change, to the bit; soft edges wholly inside the region.

        The region is the mask picture; for a change mask, the tokens that are not 0 in it.

        Args:
            image: the decoded picture, RGB, of the size of the output.
            mask: as :meth:`finish` gave it.
        """
        if mask is None or self.keep.put_back != "pixels":
            return image
        pixels = pixel_mask(mask > 0, self.target) if self.mask is None else self.mask
        return blend(image, self.original, feather(pixels, self.keep.feather_pixels))

    def _noisy(self, sigma: float) -> torch.Tensor:
        return self.control * (1 - sigma) + self.noise * sigma

    def _mask(self, latents: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
        if self.tokens is not None:
            return self.tokens
        keep = self.keep
        if keep.rule == "rcm":
            return changed_region(
                self._planes(latents - sigma * velocity),
                self._planes(self.control),
                threshold=threshold_of(keep.rcm_sensitivity, self.scale),
                kernel_size=keep.rcm_kernel_size,
                dilate_size=keep.rcm_dilate_size,
                implementation=self.implementation,
            )
        relative = keep.rcm_relative_threshold
        return musubi_mask(
            self._planes(latents),
            self._planes(self._noisy(sigma)),
            keep.rcm_threshold or 0.0 if relative is None else relative,
            relative is not None,
            keep.rcm_kernel_size,
            keep.rcm_dilate_size,
        )

    def _planes(self, latents: torch.Tensor) -> torch.Tensor:
        return unpack(latents, *self.target.grid)[0, :, 0]


def _mix(latents: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    shares = mask.reshape(1, -1, 1)
    return latents * shares + kept * (1 - shares)
