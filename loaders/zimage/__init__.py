"""Z-Image on disk: transformer, flux-type VAE and Qwen3, found and checked, none of their weights read."""

from .component import check_widths, open_text_encoder, open_transformer, open_vae

__all__ = ["check_widths", "open_text_encoder", "open_transformer", "open_vae"]
