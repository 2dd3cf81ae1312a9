"""The exported model run by the libraries' own modules: the yardstick that an engine has to meet.

The flow is that of diffusers' `QwenImageEditPlusPipeline` with two differences: the reference is encoded at the
output's size (the pipeline scales it to one megapixel, which this model has never seen), and `mm_token_type_ids` is
passed to the encoder (without it, transformers 5 leaves out the three-dimensional positions).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from . import text, tokenizer
from .latents import pack
from .vae import CHANNELS, FACTOR


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB in [0, 1], [3, h, w]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


class Model:
    """Encoder, transformer, VAE and schedule of an exported folder, in float32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        self.vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
        self.transformer = QwenImageTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32
        ).eval()
        encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        self.encode_prompt = text.Conditioner(encoder.eval(), tokenizer.load(folder / "tokenizer"))
        self.processor = text.image_processor()
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
        statistics = (self.vae.config.latents_mean, self.vae.config.latents_std)
        self.mean, self.std = (torch.tensor(values).view(1, CHANNELS, 1, 1, 1) for values in statistics)

    @torch.no_grad()
    def embed(self, image: Image.Image, prompt: str) -> torch.Tensor:
        """Prompt embeddings with the image as condition picture, [1, length, 96]."""
        return self.encode_prompt([prompt], [text.condition_pixels(image, self.processor)])[0]

    def sigmas(self, tokens: int, steps: int) -> torch.Tensor:
        """The schedule: shifted by the number of target tokens, stretched to end at 0.02, then 0."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        return self.scheduler.sigmas

    @torch.no_grad()
    def run(self, image: Image.Image, embeds: torch.Tensor, steps: int, seed: int) -> Image.Image:
        """Edits an image whose sides are multiples of 8 by given embeddings."""
        width, height = image.size
        latents = self.vae.encode((to_tensor(image) * 2 - 1)[None, :, None]).latent_dist.mode()
        reference = pack(((latents - self.mean) / self.std)[:, :, 0])
        rows, columns = height // FACTOR, width // FACTOR
        generator = torch.Generator().manual_seed(seed)
        x = pack(torch.randn((1, 1, CHANNELS, rows, columns), generator=generator)[:, 0])
        shapes = [[(1, rows // 2, columns // 2)] * 2]
        sigmas = self.sigmas(x.shape[1], steps)
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            found = self.transformer(
                hidden_states=torch.cat((x, reference), 1),
                timestep=sigma[None],
                encoder_hidden_states=embeds,
                img_shapes=shapes,
                return_dict=False,
            )[0][:, : x.shape[1]]
            x = x + (following - sigma) * found
        tiles = x.view(1, rows // 2, columns // 2, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
        latents = tiles.reshape(1, CHANNELS, 1, rows, columns) * self.std + self.mean
        pixels = self.vae.decode(latents).sample[0, :, 0].clamp(-1, 1)
        return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())

    def edit(self, image: Image.Image, prompt: str, steps: int = 8, seed: int = 0) -> Image.Image:
        """Edits an image whose sides are multiples of 8."""
        return self.run(image, self.embed(image, prompt), steps, seed)
