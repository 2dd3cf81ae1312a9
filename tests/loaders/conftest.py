"""Small model folders, written from shape tables and safetensors alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.loaders import shapes
from safetensors.torch import save_file

TRANSFORMER = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": [4, 6, 6],
    "guidance_embeds": False,
}
VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
TEXT = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 50,
    },
    "vision_config": {
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "patch_size": 14,
    },
}


def hub_text_name(name: str) -> str:
    """The names of the 2025 hub files."""
    return name.replace("language_model.", "model.") if name.startswith("language_model.") else name


def random_tensors(table: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in table.items()}


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


class Folder:
    """A diffusers folder that a test may spoil."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dit = path / "transformer" / "diffusion_pytorch_model.safetensors"
        self.vae = path / "vae" / "diffusion_pytorch_model.safetensors"
        self.text_encoder = path / "text_encoder" / "model.safetensors"

    def write(self, pipeline: str = "QwenImageEditPlusPipeline", seed: int = 0, **transformer: Any) -> "Folder":
        write_json(self.path / "model_index.json", {"_class_name": pipeline})
        write_json(self.path / "scheduler" / "scheduler_config.json", {"base_shift": 0.5})
        write_json(self.path / "tokenizer" / "tokenizer.json", {})
        config = TRANSFORMER | transformer
        write_json(self.dit.with_name("config.json"), config)
        write_json(self.vae.with_name("config.json"), VAE)
        write_json(self.text_encoder.with_name("config.json"), TEXT)
        save_file(random_tensors(shapes.transformer_shapes(config), seed), self.dit)
        save_file(random_tensors(shapes.vae_shapes(VAE), seed), self.vae)
        text = random_tensors(shapes.text_encoder_shapes(TEXT), seed)
        save_file({hub_text_name(name): tensor for name, tensor in text.items()}, self.text_encoder)
        return self


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Folder]:
    """Writes a small diffusers folder: ``folder("name", pipeline="…", zero_cond_t=True)``."""

    def make(name: str = "model", **options: Any) -> Folder:
        return Folder(tmp_path / name).write(**options)

    return make


@pytest.fixture(autouse=True)
def hub_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache of the test's own."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"
