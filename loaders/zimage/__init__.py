"""Z-Image on disk: transformer, flux-type VAE and Qwen3, found and checked, none of their weights read."""

from .component import SCHEDULER_DEFAULTS, check_widths, is_zimage, open_text_encoder, open_transformer, open_vae

__all__ = ["SCHEDULER_DEFAULTS", "check_widths", "is_zimage", "open_text_encoder", "open_transformer", "open_vae"]
