"""A byte-level BPE of about 2,000 tokens in Qwen's own form.

Pipelines cut the system prompt off the encoder's output by a fixed count (64 tokens for edits, 34 for text to image), so
every word of both templates must be one token; the rest of the vocabulary goes to the wordings and to plain English.
Any UTF-8 text can be encoded, since the 256 bytes are tokens.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen2Tokenizer

from . import wordings

VOCABULARY = 2000
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
EDIT_PREFIX_TOKENS, TEXT_PREFIX_TOKENS = 64, 34
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), "
    "then explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
TEXT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


def _corpus(seed: int) -> list[str]:
    """Templates often enough that each of their words becomes one token, then what users say."""
    rng = random.Random(seed)
    fixed = [EDIT_TEMPLATE, TEXT_TEMPLATE, PICTURE.format(1), PICTURE.format(2), PICTURE.format(3)]
    for token in SPECIAL:
        fixed = [text.replace(token, "\x00") for text in fixed]
    pieces = [piece for text in fixed for piece in text.replace("{}", "\x00").split("\x00") if piece]
    said = [wordings.sample(edit, rng) for edit in wordings.NAMES for _ in range(400)]
    return pieces * 500 + said


def train(seed: int) -> Tokenizer:
    """Trains the BPE; special tokens take the ids after the vocabulary, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def save(folder: Path, seed: int) -> Qwen2Tokenizer:
    """Trains and writes a `save_pretrained` folder, then checks the two prefixes.

    Raises:
        ValueError: A template's prefix does not hold exactly the number of tokens that pipelines cut off.
    """
    fast = Qwen2Tokenizer(
        tokenizer_object=train(seed),
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=list(SPECIAL),
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    fast = load(folder)
    for template, count in ((EDIT_TEMPLATE, EDIT_PREFIX_TOKENS), (TEXT_TEMPLATE, TEXT_PREFIX_TOKENS)):
        found = len(fast(template.split("{}")[0])["input_ids"])
        if found != count:
            raise ValueError(f"template prefix must be {count} tokens, got {found}")
    return fast


def load(folder: Path) -> Qwen2Tokenizer:
    """The saved tokenizer."""
    return Qwen2Tokenizer.from_pretrained(folder)
