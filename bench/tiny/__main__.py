"""Retrains the tiny model from a seed on a CPU: `python -m qengine.bench.tiny`.

Each stage leaves its result in the work folder and is skipped when the result is there; a stage that was cut off goes
on from its last checkpoint. The same seed, library versions and machine give the same weights unless a run was resumed.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from . import export, latents, pictures, text, tokenizer, train_dit, train_vae
from .say import say

PICTURES = 700
Tensors = dict[str, torch.Tensor]
MODEL = Path(__file__).resolve().parents[2] / "loaders" / "tiny"


def kept(path: Path, make: Callable[[], Tensors], seconds: dict[str, float]) -> Tensors:
    """The tensors that the file holds, or those that `make` makes; the CPU seconds of making are noted."""
    if path.exists():
        return load_file(path)
    started = time.process_time()
    value = make()
    save_file({name: tensor.contiguous() for name, tensor in value.items()}, path)
    seconds[path.stem] = round(time.process_time() - started, 1)
    say(f"{path.stem}: {seconds[path.stem]:.0f} s of CPU")
    return value


def untied(model: torch.nn.Module) -> Tensors:
    """The state without the head, which shares the embedding's memory."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def retrain(work: Path, out: Path, seed: int) -> None:
    """All stages, then the export."""
    work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    painted = kept(work / "pictures.safetensors", lambda: {"pictures": pictures.paint(PICTURES, seed)}, seconds)
    pool = painted["pictures"]
    vae = kept(work / "vae.safetensors", lambda: train_vae.train(pool, work, seed), seconds)
    words = tokenizer.save(work / "tokenizer", seed)
    encoder = text.build(words, seed)
    taught = kept(work / "text.safetensors", lambda: untied(text.train(pool, words, seed)), seconds)
    encoder.load_state_dict(taught, strict=False)
    encoder.tie_weights()
    encoder.eval().requires_grad_(False)

    def transformer() -> dict[str, torch.Tensor]:
        store = latents.Store(vae, pool, train_dit.ENTRIES, seed)
        return train_dit.train(store, train_dit.Prompts(encoder, words, pool, seed), work, seed)

    dit = kept(work / "dit.safetensors", transformer, seconds)
    size_bytes = export.write(out, vae, encoder, words, dit)
    say(json.dumps({"cpu_seconds": seconds, "size_bytes": size_bytes, "seed": seed, "torch": torch.__version__}))


def main() -> None:
    """Parses the options and retrains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("tiny-work"), help="checkpoints go here")
    parser.add_argument("--out", type=Path, default=MODEL, help="the exported folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    # The trainers run one thread per half batch; threads inside operations would only get in their way.
    torch.set_num_threads(1)
    retrain(options.work, options.out, options.seed)


if __name__ == "__main__":
    main()
