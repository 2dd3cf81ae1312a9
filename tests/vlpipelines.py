"""A tiny random Qwen3-VL on disk, and transformers' own model as the reference for it."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pipelines import SPECIAL_TOKENS, randomise
from qengine.engine.vl import VLEmbeddingExtractor
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LAYERS = 6
EVERY = tuple(range(-LAYERS, 0))
SPAN = "<|vision_start|><|image_pad|><|vision_end|>"
HIDDEN = 64
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 32 * 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
_TURN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
TEMPLATES = {
    "instruct": _TURN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "thinking": _TURN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
}


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE in which the words of a chat, and an empty line, are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    words = "system\nuser\nassistant\n Homer Simpson eating spaghetti be brief"
    tokenizer.train_from_iterator([words, "\n\n", "\n\n"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, extra_special_tokens=[*SPECIAL_TOKENS[1:], "<think>", "</think>"]
    )


def build_vl(folder: Path, *, variant: str = "instruct", seed: int = 0, **text: Any) -> Path:
    """Write a tiny random float32 Qwen3-VL of 6 layers, DeepStack after the first three, to `folder`."""
    tokenizer = build_tokenizer()
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
    }
    vision = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    config = Qwen3VLConfig(
        text_config={**sizes, **text},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES[variant]}), "utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), "utf-8")
    return folder


@functools.cache
def shared_vl(variant: str = "instruct") -> Path:
    """The model with seed 0, built once per test run and removed at its end; never write into it."""
    folder = Path(tempfile.mkdtemp(prefix=f"qengine-vl-{variant}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_vl(folder, variant=variant)


@functools.cache
def reference_model(folder: Path) -> Any:
    """transformers' model of a folder, in float32."""
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def reference_states(folder: Path, prompt: str, images: Sequence[Image.Image]) -> tuple[torch.Tensor, ...]:
    """All hidden states [S, D] of a chat in which each picture is one placeholder."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    given: dict[str, Any] = {}
    if images:
        processor = Qwen2VLImageProcessorPil(
            **{k: v for k, v in PROCESSOR.items() if not k.endswith(("type", "class"))}
        )
        made = processor(images=list(images), return_tensors="pt")
        given = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        for _, rows, columns in made["image_grid_thw"].tolist():
            prompt = prompt.replace("<|image_pad|>", "<|placeholder|>" * (rows * columns // 4), 1)
        prompt = prompt.replace("<|placeholder|>", "<|image_pad|>")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.no_grad():
        out = reference_model(folder).model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=kinds,
            output_hidden_states=True,
            use_cache=False,
            **given,
        )
    return tuple(states[0] for states in out.hidden_states)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with noise on it."""
    generator = np.random.default_rng([width, height, seed])
    ramp = np.linspace(0, 200, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((ramp + generator.integers(0, 56, (height, width, 3))).astype(np.uint8))


def open_vl(folder: Path | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> VLEmbeddingExtractor:
    return VLEmbeddingExtractor.from_pretrained(folder or shared_vl(), torch_dtype=dtype, **options)


@functools.cache
def shared(variant: str = "instruct") -> VLEmbeddingExtractor:
    return open_vl(shared_vl(variant))


def chat(pictures: int, text: str | None, system: str | None = None, end: str = "") -> str:
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{SPAN * pictures}{text or ''}<|im_end|>\n<|im_start|>assistant\n{end}"
