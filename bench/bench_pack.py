"""Packing speed with true shapes: one Qwen-Image block from bfloat16, beside copying the same bytes in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qengine.bench.rivals import in_turns, ratio
from qengine.bench.true_shapes import transformer
from qengine.engine.dit import QwenImageTransformer
from qengine.engine.quant import dequantise_weight
from qengine.engine.stack import pack
from qengine.loaders.component import Component
from safetensors import safe_open
from safetensors.torch import save_file

CONFIG = transformer(1)
ERROR = {"int8": 0.01, "fp8": 0.04}
CHECKED = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def component(tmp_path_factory: pytest.TempPathFactory) -> Component:
    """The tensors of one block that are packed, random, in bfloat16; 0.26 GB."""
    from qengine.loaders.checkpoint import Checkpoint
    from qengine.loaders.shapes import transformer_shapes

    place = tmp_path_factory.mktemp("block") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    wanted = {
        n: s for n, s in transformer_shapes(CONFIG).items() if n.startswith("transformer_blocks.") and "_mod." not in n
    }
    values = torch.randn(max(torch.Size(s).numel() for s in wanted.values()), generator=generator).bfloat16()
    save_file({n: values[: torch.Size(s).numel()].view(s).clone() for n, s in wanted.items()}, place)
    return Component("transformer", CONFIG, Checkpoint.open([place]))


@pytest.mark.parametrize("weight_format", ["int8", "fp8"])
def test_pack_one_block(benchmark: Any, component: Component, weight_format: str, tmp_path: Path) -> None:
    """Bytes of bfloat16 per second, file to file; the limit is the memory's own copying speed."""
    stack = QwenImageTransformer.stack(component, weight_format, torch.bfloat16)
    path = tmp_path / "packed.safetensors"
    read = component.checkpoint.bytes_read
    pack(stack, path)
    source_bytes = component.checkpoint.bytes_read - read
    with safe_open(path, "pt") as file:
        found = dequantise_weight(file.get_tensor(CHECKED), file.get_tensor(CHECKED.replace("weight", "scale")))
    expected = component.checkpoint.read(CHECKED).float()
    assert (found - expected).norm() / expected.norm() < ERROR[weight_format]
    data = torch.randint(0, 256, (source_bytes,), dtype=torch.uint8)
    other = torch.empty_like(data)
    packing, copying = in_turns((lambda: pack(stack, path), lambda: other.copy_(data)), rounds=3)
    benchmark.extra_info |= {
        "ours_seconds": min(packing),
        "limit": "copy",
        "limit_seconds": min(copying),
        "fraction_of_limit": ratio(copying, packing),
        "source_mb": source_bytes / 1e6,
        "pack_gb_per_second": source_bytes / min(packing) / 1e9,
        "memcpy_gb_per_second": source_bytes / min(copying) / 1e9,
    }
    benchmark.pedantic(lambda: pack(stack, path), rounds=1)
