"""The content address of conditioning, and the cache in memory and on disk."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import shared_pipeline
from qengine.engine.conditioning import Conditioning, ConditioningCache
from qengine.engine.encoder import PromptEncoder
from qengine.loaders.source import open_model

KEYS = [f"{number:064x}" for number in range(10)]


def conditioning(number: int = 0, *, negative: bool = True, dtype: torch.dtype = torch.bfloat16) -> Conditioning:
    generator = torch.Generator().manual_seed(number)
    positive, other = (torch.randn(rows, 16, generator=generator).to(dtype) for rows in (7, 5))
    return Conditioning(positive, other if negative else None, KEYS[number])


def assert_same(found: Conditioning | None, expected: Conditioning) -> None:
    assert found is not None and found.key == expected.key
    assert found.prompt_embeds.dtype == expected.prompt_embeds.dtype
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert (found.negative_embeds is None) == (expected.negative_embeds is None)
    if found.negative_embeds is not None and expected.negative_embeds is not None:
        assert torch.equal(found.negative_embeds, expected.negative_embeds)


def test_a_conditioning_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        conditioning().key = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_put_comes_back_bit_for_bit_from_the_disk(tmp_path: Path, negative: bool, dtype: torch.dtype) -> None:
    made = conditioning(1, negative=negative, dtype=dtype)
    ConditioningCache(tmp_path / "new" / "folder").put(made)
    assert_same(ConditioningCache(tmp_path / "new" / "folder").get(made.key), made)
    assert ConditioningCache(tmp_path / "new" / "folder").get(KEYS[2]) is None
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"{made.key}.safetensors"]


def test_memory_keeps_only_the_entries_used_last() -> None:
    cache = ConditioningCache(memory_entries=2)
    for number in range(2):
        cache.put(conditioning(number))
    cache.get(KEYS[0])
    cache.put(conditioning(2))
    assert [cache.get(key) is not None for key in KEYS[:3]] == [True, False, True]


def _damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[:-3]
    elif kind == "empty":
        data = bytearray()
    elif kind == "flipped bit":
        data[-1] ^= 1
    elif kind == "header of another size":
        data[0] ^= 255
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["truncated", "empty", "flipped bit", "header of another size"])
def test_a_damaged_file_is_ignored_with_a_warning_and_written_again(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = conditioning(3)
    ConditioningCache(tmp_path).put(made)
    path = tmp_path / f"{made.key}.safetensors"
    _damage(path, kind)
    cache = ConditioningCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert cache.get(made.key) is None
    assert "ignored" in caplog.text and path.name in caplog.text
    cache.put(made)
    assert_same(ConditioningCache(tmp_path).get(made.key), made)


def test_a_file_under_another_key_is_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ConditioningCache(tmp_path).put(conditioning(3))
    shutil.copy(tmp_path / f"{KEYS[3]}.safetensors", tmp_path / f"{KEYS[4]}.safetensors")
    with caplog.at_level(logging.WARNING):
        assert ConditioningCache(tmp_path).get(KEYS[4]) is None
    assert "key" in caplog.text


def test_the_folder_stays_below_its_bound_and_the_oldest_files_go_first(tmp_path: Path) -> None:
    ConditioningCache(tmp_path).put(conditioning(0))
    size = (tmp_path / f"{KEYS[0]}.safetensors").stat().st_size
    (tmp_path / "not ours.safetensors").write_bytes(b"kept")
    cache = ConditioningCache(tmp_path, max_bytes=3 * size)
    for number in range(1, 3):
        cache.put(conditioning(number))
    for number in range(3):
        os.utime(tmp_path / f"{KEYS[number]}.safetensors", (1000 + number, 1000 + number))
    assert ConditioningCache(tmp_path).get(KEYS[0]) is not None
    cache.put(conditioning(3))
    kept = {number for number in range(4) if (tmp_path / f"{KEYS[number]}.safetensors").exists()}
    assert kept == {0, 2, 3}
    assert (tmp_path / "not ours.safetensors").exists()


def test_one_entry_larger_than_the_bound_is_still_kept(tmp_path: Path) -> None:
    cache = ConditioningCache(tmp_path, max_bytes=1)
    cache.put(conditioning(0))
    cache.put(conditioning(1))
    assert ConditioningCache(tmp_path).get(KEYS[0]) is None
    assert_same(ConditioningCache(tmp_path).get(KEYS[1]), conditioning(1))


def test_a_folder_that_cannot_be_written_is_reported_and_memory_still_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = ConditioningCache(tmp_path / "file" / "below")
    with caplog.at_level(logging.WARNING):
        cache.put(conditioning(0))
    assert "not kept on disk" in caplog.text
    assert_same(cache.get(KEYS[0]), conditioning(0))


@pytest.mark.parametrize("key", ["../escape", "", "0" * 63, "A" * 64])
def test_a_key_that_is_no_digest_never_touches_the_disk(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ConditioningCache(tmp_path / "cache")
    assert cache.get(key) is None
    cache.put(Conditioning(torch.ones(1, 2), None, key))
    assert "64 hexadecimal digits" in caplog.text
    assert list(tmp_path.iterdir()) == []


def open_encoder(kind: str = "edit-2511", device: str = "cpu", dtype: torch.dtype = torch.float32) -> PromptEncoder:
    return PromptEncoder(open_model(shared_pipeline(kind)), torch.device(device), dtype)


def test_the_key_changes_with_everything_that_changes_the_embeddings() -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    encoder = open_encoder()
    keys = [
        encoder.key(["a", "b"], [red], "edit-plus"),
        encoder.key(["b", "a"], [red], "edit-plus"),
        encoder.key(["a"], [red], "edit-plus"),
        encoder.key(["ab"], [red], "edit-plus"),
        encoder.key(["a", "b"], [blue], "edit-plus"),
        encoder.key(["a", "b"], [red, red], "edit-plus"),
        encoder.key(["a", "b"], [red, blue], "edit-plus"),
        encoder.key(["a", "b"], [blue, red], "edit-plus"),
        encoder.key(["a", "b"], [red.resize((30, 40))], "edit-plus"),
        encoder.key(["a", "b"], [red], "edit"),
        open_encoder(dtype=torch.bfloat16).key(["a", "b"], [red], "edit-plus"),
        open_encoder(device="meta").key(["a", "b"], [red], "edit-plus"),
    ]
    assert len(set(keys)) == len(keys)
    assert open_encoder().key(["a", "b"], [red.copy()], "edit-plus") == keys[0]


def test_the_key_depends_on_the_files_of_the_model(tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(shared_pipeline("edit-2511"), copied)

    def key() -> str:
        return PromptEncoder(open_model(copied), torch.device("cpu"), torch.float32).key(["a"], [], "edit-plus")

    first = key()
    assert first == open_encoder().key(["a"], [], "edit-plus")
    tokenizer = copied / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    second = key()
    processor = copied / "processor" / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("3136", "6272"))
    third = key()
    assert len({first, second, third}) == 3


def test_a_hit_needs_neither_weights_nor_tokenizer_nor_transformers(tmp_path: Path) -> None:
    folder = shared_pipeline("qwen-image")
    encoder = open_encoder("qwen-image")
    key = encoder.key(["a", " "], [], "text")
    positive, negative = encoder.encode(["a", " "], [], "text")
    made = Conditioning(positive, negative, key)
    ConditioningCache(tmp_path).put(made)
    script = f"""
import sys, torch
from pathlib import Path
from qengine.engine.conditioning import ConditioningCache
from qengine.engine.encoder import PromptEncoder
from qengine.loaders.source import open_model
encoder = PromptEncoder(open_model(Path({str(folder)!r})), torch.device("cpu"), torch.float32)
found = ConditioningCache(Path({str(tmp_path)!r})).get(encoder.key(["a", " "], [], "text"))
assert found is not None and "transformers" not in sys.modules
sys.stdout.write(repr(float(found.prompt_embeds.double().sum())))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == repr(float(made.prompt_embeds.double().sum()))
