"""The text encoder: a miniature Qwen2.5-VL, taught by a probe which edit is asked, then frozen.

Trained jointly with the transformer it collapsed in trials (every prompt became the same vector), so it learns first,
alone: a linear probe must read the edit from each of the last five tokens (the assistant's header, which sees all of
the prompt). The condition picture is random in this stage, so the answer does not depend on it.
"""

from __future__ import annotations

import logging
import math
import random
import time
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from . import tokenizer as words
from . import wordings
from .optim import WORKERS, Trainer

STEPS, BATCH, RATE, SMOOTHING = 400, 64, 1.5e-3, 0.05
HIDDEN, TAIL = 96, 5
MIN_PIXELS, MAX_PIXELS = 784, 3600
CONDITION_PIXELS = 384 * 384
log = logging.getLogger(__name__)

Picture = tuple[torch.Tensor, torch.Tensor]


def image_processor() -> Qwen2VLImageProcessorPil:
    """Bounds the condition picture to 3600 pixels: at most four vision tokens."""
    return Qwen2VLImageProcessorPil(
        min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, patch_size=14, temporal_patch_size=2, merge_size=2
    )


def build(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh encoder: 2 layers of width 96 over a 2-layer vision tower of width 64."""
    torch.manual_seed(seed)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "im_end", "endoftext")}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 16) * 16,
            "hidden_size": HIDDEN,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config).float()


def condition_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of the condition picture: an area of 384^2 at the picture's ratio, in multiples of 32."""
    wide = math.sqrt(CONDITION_PIXELS * width / height)
    return round(wide / 32) * 32, round(wide * height / width / 32) * 32


def condition_pixels(image: Image.Image, processor: Qwen2VLImageProcessorPil) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [patches, 1176] and grid [1, 3] of the condition picture, resized as the pipelines do."""
    resized = image.convert("RGB").resize(condition_size(*image.size), Image.Resampling.LANCZOS)
    out = processor(images=[resized], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


class Conditioner:
    """Prompt and picture -> embeddings, exactly as the edit pipeline makes them."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.image_token = int(model.config.image_token_id)

    def ids(self, prompt: str, vision_tokens: int) -> list[int]:
        """Token ids of the whole template, the picture's placeholder repeated once per vision token."""
        picture = words.PICTURE.format(1).replace("<|image_pad|>", "<|image_pad|>" * vision_tokens)
        return self.tokenizer(words.EDIT_TEMPLATE.format(picture + prompt))["input_ids"]

    def __call__(self, prompts: list[str], pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes a batch.

        Returns:
            Embeddings [batch, longest, 96] without the 64 tokens of the system prompt, padded on the right, and the
            mask [batch, longest] of the real ones.
        """
        rows = [self.ids(p, int(grid.prod()) // 4) for p, (_, grid) in zip(prompts, pictures, strict=True)]
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.cat([pixels for pixels, _ in pictures]),
            image_grid_thw=torch.cat([grid for _, grid in pictures]),
            mm_token_type_ids=(ids == self.image_token).int(),
        ).last_hidden_state
        cut = words.EDIT_PREFIX_TOKENS
        return hidden[:, cut:], mask[:, cut:].bool()


def thumbnails(pool: torch.Tensor, count: int, seed: int) -> list[Picture]:
    """Condition patches of random pictures in the four shapes that occur (square, portrait, landscape, panorama)."""
    rng, processor, out = random.Random(seed), image_processor(), []
    for _ in range(count):
        picture = Image.fromarray(pool[rng.randrange(len(pool))].permute(1, 2, 0).numpy())
        width, height = rng.choice(((256, 256), (192, 256), (256, 192), (256, 100)))
        out.append(condition_pixels(picture.crop((0, 0, width, height)), processor))
    return out


def tail_of(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last five real tokens of each row, [batch, 5, 96]."""
    ends = mask.sum(1, keepdim=True) - TAIL + torch.arange(TAIL)
    return hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1]))


def train(pool: torch.Tensor, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Trains encoder and probe, logs the probe's accuracy on the held-out phrases, returns the frozen encoder."""
    model = build(tokenizer, seed)
    probe = nn.Linear(HIDDEN, len(wordings.NAMES))
    both = nn.ModuleDict({"model": model, "probe": probe})
    trainer = Trainer(both, RATE, STEPS, 0.99, slow=("embed_tokens", "probe"))
    encode, shots, rng = Conditioner(model, tokenizer), thumbnails(pool, 200, seed), random.Random(seed)
    started = time.process_time()
    model.train()
    for step in range(STEPS):
        labels = [rng.randrange(len(wordings.NAMES)) for _ in range(BATCH)]
        prompts = [wordings.sample(wordings.NAMES[label], rng) for label in labels]
        pictures = [rng.choice(shots) for _ in prompts]

        def part(
            index: int, labels: list[int] = labels, prompts: list[str] = prompts, pictures: list[Picture] = pictures
        ) -> torch.Tensor:
            hidden, mask = encode(prompts[index::WORKERS], pictures[index::WORKERS])
            target = torch.tensor(labels[index::WORKERS])[:, None].expand(-1, TAIL)
            logits = probe(tail_of(hidden, mask)).flatten(0, 1)
            return F.cross_entropy(logits, target.flatten(), label_smoothing=SMOOTHING)

        loss = trainer.step([partial(part, index) for index in range(WORKERS)])
        if step % 100 == 0:
            log.info("text %d: loss %.4f, %.0f s of CPU", step, loss, time.process_time() - started)
    both.load_state_dict(trainer.averaged())
    model.eval().requires_grad_(False)
    log.info("text: held-out phrases read by the probe %.1f %%", 100 * probe_accuracy(encode, probe, shots))
    return model


@torch.no_grad()
def probe_accuracy(encode: Conditioner, probe: nn.Linear, shots: list[Picture]) -> float:
    """Share of held-out phrases whose edit the probe names from the last token."""
    right = total = 0
    for label, name in enumerate(wordings.NAMES):
        prompts = list(wordings.HELD_OUT[name])
        hidden, mask = encode(prompts, shots[: len(prompts)])
        named = probe(tail_of(hidden, mask)[:, -1]).argmax(-1)
        for prompt, found in zip(prompts, named.tolist(), strict=True):
            if found != label:
                log.info("text: %r (%s) read as %s", prompt, name, wordings.NAMES[found])
        right += int((named == label).sum())
        total += len(prompts)
    return right / total
