"""Writes the trained parts as one diffusers folder in bfloat16.

Each part is saved by its own library, so that any program which reads Qwen-Image-Edit folders reads this one.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from . import dit, text, vae

SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
PROCESSOR = {
    "min_pixels": text.MIN_PIXELS,
    "max_pixels": text.MAX_PIXELS,
    "size": {"shortest_edge": text.MIN_PIXELS, "longest_edge": text.MAX_PIXELS},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
INDEX = {
    "_class_name": "QwenImageEditPlusPipeline",
    "_qengine_defaults": "tiny",
    "processor": ["transformers", "Qwen2VLProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_vae(weights: dict[str, torch.Tensor]) -> AutoencoderKLQwenImage:
    """The 3-D model holding the 2-D weights."""
    model = AutoencoderKLQwenImage(
        base_dim=vae.BASE,
        z_dim=vae.CHANNELS,
        dim_mult=list(vae.MULTIPLIERS),
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=weights["latents_mean"].tolist(),
        latents_std=weights["latents_std"].tolist(),
    )
    flat = {name: value for name, value in weights.items() if not name.startswith("latents_")}
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict(vae.to_3d(flat, shapes))
    return model


def write(
    folder: Path,
    vae_weights: dict[str, torch.Tensor],
    encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Qwen2Tokenizer,
    dit_weights: dict[str, torch.Tensor],
) -> int:
    """Writes the folder; returns its size in bytes."""
    transformer = QwenImageTransformer2DModel(**dit.config())
    transformer.load_state_dict(dit_weights)
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    build_vae(vae_weights).to(torch.bfloat16).save_pretrained(folder / "vae")
    # A copy, since the caller may go on using the encoder in float32.
    half = Qwen2_5_VLForConditionalGeneration(encoder.config)
    half.load_state_dict(encoder.state_dict())
    half.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    for name in ("tokenizer", "processor"):
        tokenizer.save_pretrained(folder / name)
    _write(folder / "processor" / "preprocessor_config.json", PROCESSOR)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    _write(folder / "model_index.json", {**INDEX, "_diffusers_version": diffusers.__version__})
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
