"""Loading true-shape weights: two Qwen-Image blocks in bfloat16, onto the tape and by safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from qengine.bench.rivals import duel
from qengine.bench.true_shapes import transformer
from qengine.engine.dit import QwenImageTransformer
from qengine.loaders.component import open_transformer
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
CONFIG = transformer(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer folder of 1.4 GB: right names, shapes and dtype, arbitrary values."""
    place = tmp_path_factory.mktemp("transformer")
    with torch.device("meta"):
        model = QwenImageTransformer2DModel.from_config(CONFIG)
    tensors = {name: torch.full(t.shape, 0.01, dtype=torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(tensors, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


def test_load_two_blocks_onto_the_tape(benchmark: Any, folder: Path) -> None:
    """Header checks and parallel reads into slabs, file in the page cache; the rival reads the same file whole."""

    def ours() -> QwenImageTransformer:
        return QwenImageTransformer.load(open_transformer(folder), device=CPU, dtype=torch.bfloat16, cache=None)

    def theirs() -> dict[str, torch.Tensor]:
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        return {name: tensor.clone() for name, tensor in tensors.items()}  # mapped pages become memory

    model = ours()
    *_, (_, views) = model.blocks.sweep(more=False)
    assert float(views["img_mlp.net.2.weight"][0, 0]) == pytest.approx(0.01, rel=1e-2)
    read = model.nbytes
    result = duel(ours, theirs, rounds=3)
    benchmark.extra_info |= {
        "bytes": read,
        "bytes_per_second": read / min(result.ours),
        "safetensors_seconds": min(result.theirs),
        "speedup": result.speedup,
    }
    benchmark.pedantic(ours, rounds=3)
