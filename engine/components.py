"""The parts of an opened model, loaded when first needed and freed in the order a run needs them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import DeviceError, RequestError
from ..loaders import ModelSource
from .conditioning import Conditioning, ConditioningCache
from .dit import QwenImageTransformer
from .encoder import PromptEncoder
from .vae import ImageVAE

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

KEEP_ENCODER_BELOW_BYTES = 1 << 30
"""An encoder smaller than this stays between requests; a larger one is freed before the transformer is read."""

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


def default_cache() -> Path:
    """``$QENGINE_CACHE``, else ``$XDG_CACHE_HOME/qengine``, else ``~/.cache/qengine``."""
    chosen = os.environ.get("QENGINE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qengine"


class Components:
    """Encoder, transformer and VAE of one model on one device.

    Args:
        source: what was opened.
        device: where everything runs.
        dtype: compute dtype.
        cache: folder of cached conditioning and modulation rows; None takes :func:`default_cache`.
    """

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype, cache: Path | None) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self._cache = cache or default_cache()
        self._conditioning = ConditioningCache(self._cache / "conditioning")
        self._encoder: PromptEncoder | None = None
        self._transformer: QwenImageTransformer | None = None
        self._vae: ImageVAE | None = None

    @property
    def multiple(self) -> int:
        """Pixels per token side: the VAE's factor times the patch of 2."""
        return 2 * 2 ** len(self.source.vae.config["temperal_downsample"])

    @property
    def vae(self) -> ImageVAE:
        """The image VAE."""
        if self._vae is None:
            self._vae = ImageVAE.load(self.source.vae, device=self.device, dtype=self.dtype)
        return self._vae

    @property
    def transformer(self) -> QwenImageTransformer:
        """The diffusion transformer."""
        if self._transformer is None:
            self._transformer = QwenImageTransformer.load(
                self.source.transformer, device=self.device, dtype=self.dtype, cache=self._cache
            )
        return self._transformer

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
        encoder = self._encoder or PromptEncoder(self.source, self.device, self.dtype)
        prompts = [prompt] if negative is None else [prompt, negative]
        key = encoder.key(prompts, pictures, template)
        known = self._conditioning.get(key)
        if known is not None:
            return known, True
        embeds = encoder.encode(prompts, pictures, template, check=check)
        made = Conditioning(embeds[0], embeds[1] if negative is not None else None, key)
        self._conditioning.put(made)
        self._keep_or_free(encoder)
        return made, False

    def _keep_or_free(self, encoder: PromptEncoder) -> None:
        if self.source.text_encoder.checkpoint.nbytes <= KEEP_ENCODER_BELOW_BYTES:
            self._encoder = encoder
        else:
            encoder.release()

    def release(self) -> None:
        """Free every weight."""
        if self._encoder is not None:
            self._encoder.release()
        self._encoder = self._transformer = self._vae = None
