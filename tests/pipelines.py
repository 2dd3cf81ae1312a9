"""Tiny random diffusers pipelines on disk, and the diffusers objects that serve as the reference for them.

`build_pipeline` writes a folder as `save_pretrained` does; `reference_pipeline` loads one into the diffusers class.
Weights are random and every tensor matters: norms are drawn around 1, matrices keep the scale of what flows through
them, no bias is zero.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from qengine.bench.stock import reference_areas
from qengine.bench.stock import stock_pipeline as reference_pipeline
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

KINDS = ("qwen-image", "edit", "edit-2509", "edit-2511")
PIPELINE_CLASSES = {
    "qwen-image": QwenImagePipeline,
    "edit": QwenImageEditPipeline,
    "edit-2509": QwenImageEditPlusPipeline,
    "edit-2511": QwenImageEditPlusPipeline,
}
__all__ = ["build_pipeline", "reference_areas", "reference_pipeline", "shared_pipeline"]

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
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
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 80 * 28 * 28,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def template_texts() -> list[str]:
    """The prompt templates of the pipeline classes, read from diffusers."""
    shells: list[Any] = [
        cls.__new__(cls) for cls in (QwenImagePipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline)
    ]
    texts = []
    for shell in shells:
        shell.register_modules = lambda **_: None
        type(shell).__init__(shell, *[None] * (5 if isinstance(shell, QwenImagePipeline) else 6))
        texts.append(shell.prompt_template_encode)
    return [*texts, "Picture 1: Picture 2: Picture 3: "]


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in which each word of the templates is one token, so that their prefixes hold 34 and 64 tokens."""
    words = [text.replace("<|im_start|>", "\n").replace("<|im_end|>", "\n") for text in template_texts()]
    words = [word.replace("<|vision_start|><|image_pad|><|vision_end|>", "\n") for word in words]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator([*words, "system\nuser\nassistant\n make it a cat grayscale night"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=131072,
    )


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Draw every parameter of `module` from `seed` so that each one is felt at the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "gamma" or (leaf == "weight" and parameter.ndim == 1):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                taps = parameter.shape[2] if parameter.ndim == 5 and "patch_embed" not in name else 1
                parameter.copy_(noise * (taps / parameter[0].numel()) ** 0.5)


def build_text_encoder(tokenizer: Qwen2Tokenizer, **overrides: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of three layers with grouped keys, and a vision tower of one window block and one full block."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    hidden = overrides.get("text_hidden", 64)
    rotary_pairs = hidden // 8
    temporal, height = rotary_pairs // 4, (rotary_pairs - rotary_pairs // 4) // 2
    sections = [temporal, height, rotary_pairs - temporal - height]
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 96,
        "num_hidden_layers": overrides.get("text_layers", 3),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {
        "depth": overrides.get("vision_depth", 2),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [1],
        "window_size": 112,
        "patch_size": 14,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=overrides.get("tied", False),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_vae(seed: int) -> Any:
    """The image VAE at base width 16, its last layers scaled so that latents and pixels keep a natural spread."""
    vae: Any = AutoencoderKLQwenImage(base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).eval()
    randomise(vae, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        moments = vae.encode(torch.rand(1, 3, 1, 64, 64, generator=generator) * 2 - 1).latent_dist.mean
        _scale(vae.quant_conv, 2.0 / moments.std().item())
        vae.decoder.conv_out.bias.mul_(0.1)
        hidden = vae.decoder(vae.post_quant_conv(torch.randn(1, 16, 1, 8, 8, generator=generator) * 2))
        _scale(vae.decoder.conv_out, 0.3 / hidden.std().item())
    return vae


def _scale(layer: Any, factor: float) -> None:
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def build_pipeline(kind: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random float32 pipeline of one of `KINDS` to `folder` in the diffusers layout.

    Args:
        kind: one of `KINDS`.
        folder: where to write; made when missing.
        seed: of all weights.
        **overrides: `layers` (DiT, 3), `text_hidden` (64), `text_layers` (3), `vision_depth` (2), `tied` (False),
            `zero_cond_t`, `max_pixels` and `min_pixels` of the processor, `dtype` of the stored weights.
    """
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer, **overrides)
    randomise(text_encoder, seed)
    transformer: Any = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=overrides.get("layers", 3),
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=overrides.get("text_hidden", 64),
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=overrides.get("zero_cond_t", kind == "edit-2511"),
    ).eval()
    randomise(transformer, seed + 1)
    parts: dict[str, Any] = {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
        "vae": build_vae(seed + 2),
    }
    for name, part in parts.items():
        if name in ("text_encoder", "transformer", "vae") and "dtype" in overrides:
            part.to(overrides["dtype"])
        part.save_pretrained(folder / name)
    _write_index(kind, folder, parts)
    if kind != "qwen-image":
        _write_processor(folder / "processor", tokenizer, overrides)
    return folder


def _write_index(kind: str, folder: Path, parts: Mapping[str, Any]) -> None:
    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASSES[kind].__name__,
        "_diffusers_version": diffusers.__version__,
    }
    if kind != "qwen-image":
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
    for name, part in sorted(parts.items()):
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_processor(folder: Path, tokenizer: Qwen2Tokenizer, overrides: Mapping[str, Any]) -> None:
    """`Qwen2VLProcessor` cannot be built without torchvision, so its folder is written by hand."""
    tokenizer.save_pretrained(folder)
    config = PROCESSOR | {key: overrides[key] for key in ("min_pixels", "max_pixels") if key in overrides}
    config["size"] = {"shortest_edge": config["min_pixels"], "longest_edge": config["max_pixels"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@functools.cache
def shared_pipeline(kind: str) -> Path:
    """The pipeline of `kind` with seed 0, built once per test run and removed at its end; never write into it."""
    folder = Path(tempfile.mkdtemp(prefix=f"qengine-{kind}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_pipeline(kind, folder)
