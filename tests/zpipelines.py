"""Tiny random Z-Image pipelines on disk, the diffusers objects that are the reference for them, and how ours open."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from pipelines import _scale, build_tokenizer, randomise
from qengine.loaders import zimage
from qengine.loaders.document import read_json
from qengine.loaders.source import ModelSource
from qengine.loaders.variant import folder_variant
from transformers import AutoTokenizer, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}
TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 64,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 48,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [4, 6, 6],
    "axes_lens": [256, 64, 64],
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 16, 24, 24],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
__all__ = ["build_zimage", "open_zimage", "reference_img2img", "reference_zimage", "shared_zimage"]


def build_text_encoder(tokenizer: Qwen2Tokenizer, hidden: int) -> Qwen3ForCausalLM:
    """A Qwen3 of three layers with grouped keys, heads wider than the hidden size would give, and tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


def build_vae(seed: int, **overrides: Any) -> AutoencoderKL:
    """A flux-type VAE, its last layers scaled so that latents and pixels keep a natural spread."""
    vae: Any = AutoencoderKL(**(VAE | overrides)).eval()
    randomise(vae, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean = vae.encode(torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1).latent_dist.mean
        _scale(vae.encoder.conv_out, 2.0 / mean.std().item())
        vae.decoder.conv_out.bias.mul_(0.1)
        hidden = vae.decode(torch.randn(1, vae.config.latent_channels, 8, 8, generator=generator) * 2).sample
        _scale(vae.decoder.conv_out, 0.3 / hidden.std().item())
    return vae


def build_zimage(folder: Path, *, seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any) -> Path:
    """Write a tiny random float32 Z-Image pipeline to `folder` in the diffusers layout.

    Args:
        folder: where to write; made when missing. Its name decides between Z-Image and Z-Image-Turbo.
        seed: of all weights.
        dtype: of the stored weights.
        **overrides: of the transformer's config; `text_hidden` of the text encoder (the transformer's `cap_feat_dim`).
    """
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT
    config = TRANSFORMER | {key: value for key, value in overrides.items() if key in TRANSFORMER}
    transformer: Any = ZImageTransformer2DModel(**config).eval()
    randomise(transformer, seed + 1)
    text_encoder = build_text_encoder(tokenizer, overrides.get("text_hidden", config["cap_feat_dim"]))
    randomise(text_encoder, seed)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": build_vae(seed + 2),
    }
    for name, part in parts.items():
        if name in ("text_encoder", "transformer", "vae") and dtype is not None:
            part.to(dtype)
        part.save_pretrained(folder / name)
    index: dict[str, Any] = {"_class_name": "ZImagePipeline", "_diffusers_version": diffusers.__version__}
    for name, part in sorted(parts.items()):
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


@functools.cache
def shared_zimage() -> Path:
    """The pipeline with seed 0, built once per test run and removed at its end; never write into it."""
    root = Path(tempfile.mkdtemp(prefix="qengine-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return build_zimage(root / "tiny-z-image-turbo")


def _reference(cls: Any, folder: Path) -> Any:
    pipeline = cls(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKL.from_pretrained(folder / "vae").eval(),
        text_encoder=Qwen3ForCausalLM.from_pretrained(folder / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@functools.cache
def reference_zimage() -> Any:
    """diffusers' text-to-image pipeline over :func:`shared_zimage`."""
    return _reference(ZImagePipeline, shared_zimage())


@functools.cache
def reference_img2img() -> Any:
    """diffusers' image-to-image pipeline over :func:`shared_zimage`."""
    return _reference(ZImageImg2ImgPipeline, shared_zimage())


def open_zimage(folder: Path) -> ModelSource:
    """The parts of a folder, checked as the engine checks them."""
    transformer = zimage.open_transformer(folder / "transformer")
    vae, text_encoder = zimage.open_vae(folder / "vae"), zimage.open_text_encoder(folder / "text_encoder")
    zimage.check_widths(transformer, vae, text_encoder)
    index = read_json(folder / "model_index.json")
    variant = folder_variant(index, transformer.config, marked=False, names=(folder.name,), model_version=None)
    return ModelSource(
        label=str(folder),
        variant=variant.name,
        defaults=variant.name,
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer_dir=folder / "tokenizer",
        processor_config={},
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        notes=(),
        fingerprint="",
    )
