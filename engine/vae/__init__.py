"""The image VAE of Qwen-Image, in two dimensions."""

from .model import ImageVAE

__all__ = ["ImageVAE"]
