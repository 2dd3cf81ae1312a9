"""A VAE without the rest of its model, as musubi-tuner's latent caching is given one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import RequestError
from ...loaders.component import Component, open_vae
from ..components import pick_device, pick_dtype
from ..defaults import DEFAULTS, Defaults
from ..picture import load_picture, to_tensor
from ..vae import ImageVAE

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Source:
    """What is known of the model behind a VAE.

    Attributes:
        vae: config and checkpoint.
        variant: as the user says; it decides the names of the files.
    """

    vae: Component
    variant: str

    @property
    def fingerprint(self) -> str:
        """Of the VAE."""
        return self.vae.checkpoint.fingerprint


class VaeAlone:
    """Stands in for an engine where only latents are wanted; all of the VAE's encoder lies on the device.

    Args:
        source: the VAE.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        vae_tile: rows of pixels at a time, or None.
        weight_format: of the convolutions.

    Raises:
        CheckpointError: the VAE is missing or damaged.
        DeviceError: the device is not there.
    """

    def __init__(self, source: Source, device: str, dtype: str, vae_tile: int | None, weight_format: str) -> None:
        self.source = source
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self._vae = ImageVAE.load(
            source.vae,
            device=self.device,
            dtype=self.dtype,
            parts=("encoder",),
            vae_tile=vae_tile,
            weight_format=weight_format,
        )

    @classmethod
    def open(cls, place: Path, *, edits: bool, device: str, dtype: str, **more: Any) -> VaeAlone:
        """Read a VAE's folder or single file.

        Args:
            place: of the VAE.
            edits: the model behind it looks at pictures.
            device: as the class takes it.
            dtype: as the class takes it.
            more: ``vae_tile`` and ``weight_format``.
        """
        source = Source(open_vae(place), "qwen-image-edit-2509" if edits else "qwen-image")
        return cls(source, device, dtype, more.get("vae_tile"), more.get("weight_format") or "bf16")

    @property
    def defaults(self) -> Defaults:
        """Of the model behind it."""
        return DEFAULTS[self.source.variant]

    def latents(self, image: Image.Image) -> torch.Tensor:
        """As ``Engine.latents``; sides must be multiples of 16.

        Raises:
            InputError: the picture cannot be used.
        """
        pixels = to_tensor(load_picture(image).image)
        return self._vae.encode(pixels.to(self.device, self.dtype)).cpu()

    def encode(self, request: Any) -> Any:
        """Raise RequestError: there is no text encoder here."""
        raise RequestError("captions must be encoded by a text encoder, got a VAE alone", hint="--model MODEL")
