"""What a weight format costs in accuracy: ``python -m qengine.bench.fidelity`` measures it and keeps JSON lines.

Each linear layer of a Qwen-Image block at its true shape, against the product in float64, and the embedded model end
to end, against itself in float32. ``python -m qengine.bench.readme`` makes the README's table of the lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..engine.files import write_whole
from ..engine.quant import quantise_weight, row_group
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.linear_int8 import linear_int8
from ..kernels.quant import quantise_rows, quantise_tokens
from ..loaders.shapes import transformer_shapes
from .drift import drifts
from .ops import error
from .readme import fidelity_table
from .run import origin
from .true_shapes import transformer

RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"
TOKENS = 128
WEIGHT_SPREAD = 0.02
DEGREES = 3
OUTLIERS, OUTLIER_FACTOR = 8, 50.0
LAYERS = ("attn.to_q", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_in")
"""One layer of each shape; text layers have the shapes of the image's, ``txt_in`` stands before the blocks."""

Values = Callable[[tuple[int, int], torch.Generator], torch.Tensor]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``x @ weight.T`` of bfloat16 [M, K] and [N, K] in a weight format, bfloat16 [M, N]."""


def normal(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(shape, generator=generator)


def student(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Student's t with 3 degrees of freedom, ``z / sqrt(chi2 / 3)``: the heavy tails of trained weights."""
    draws = torch.randn((DEGREES, *shape), generator=generator)
    return torch.randn(shape, generator=generator) / draws.square_().mean(0).sqrt_()


def planted(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Standard normal values with 8 columns 50 times as large, as activations of large transformers have them."""
    values = torch.randn(shape, generator=generator)
    columns = torch.randperm(shape[1], generator=generator)[:OUTLIERS]
    values[:, columns] *= OUTLIER_FACTOR
    return values


VALUES: Mapping[str, tuple[Values, Values]] = {
    "normal": (normal, normal),
    f"Student t, {DEGREES} degrees": (student, student),
    "outlier columns": (normal, planted),
}
"""How weights and activations are drawn."""


def _bf16(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _int8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_int8(x, *quantise_weight(weight, "int8"), None, row_group(weight.shape[1], "int8"))


def _int8_plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return linear_int8(x, *quantise_rows(weight, "int8", 1), None, 1)


def _fp8(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As cards with 8-bit float units multiply: tokens are rounded to e4m3 too."""
    stored, scale = quantise_rows(weight, "fp8", 1)
    tokens, token_scale = quantise_tokens(x, "fp8", 1)
    return ((tokens.float() @ stored.float().t()) * token_scale[:, None] * scale).to(x.dtype)


def _fp8_weights(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As other devices multiply: weights alone are in 8 bits."""
    return linear_fp8(x, *quantise_rows(weight, "fp8", 1), None)


FORMATS: Mapping[str, Product] = {
    "bf16": _bf16,
    "int8": _int8,
    "int8, not rotated": _int8_plain,
    "fp8": _fp8,
    "fp8, weights alone": _fp8_weights,
}


def linear_shapes() -> dict[str, tuple[int, int]]:
    """[N, K] of :data:`LAYERS`."""
    shapes = transformer_shapes(transformer(1))
    found = {}
    for layer in LAYERS:
        rows, columns = shapes.get(f"transformer_blocks.0.{layer}.weight") or shapes[f"{layer}.weight"]
        found[layer] = (rows, columns)
    return found


def linears(shapes: Mapping[str, tuple[int, int]], tokens: int = TOKENS, seed: int = 0) -> Iterator[dict[str, Any]]:
    """One line per layer, way of drawing and format: ``relative_l2`` is ``|y - y64| / |y64|``.

    Weights (times 0.02) and activations are rounded to bfloat16 before anything else; y64 is their product in float64.

    Args:
        shapes: [N, K] by name.
        tokens: rows of the activations.
        seed: of the first line's values.
    """
    for index, (layer, shape) in enumerate(shapes.items()):
        for values, (draw_weight, draw_x) in VALUES.items():
            generator = torch.Generator().manual_seed(seed + index)
            weight = (draw_weight(shape, generator) * WEIGHT_SPREAD).bfloat16()
            x = draw_x((tokens, shape[1]), generator).bfloat16()
            exact = x.double() @ weight.double().t()
            for name, product in FORMATS.items():
                found = error(product(x, weight), exact)
                yield {
                    "kind": "linear",
                    "layer": layer,
                    "shape": list(shape),
                    "values": values,
                    "format": name,
                    "relative_l2": found,
                }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the lines in the place of those that were there, and print the README's table.

    Args:
        argv: the options; None takes them from the process.

    Returns:
        0; a goal that is missed is said in the table.
    """
    parser = argparse.ArgumentParser(prog="python -m qengine.bench.fidelity", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the lines go")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="rows of the activations")
    parser.add_argument("--toy", action="store_true", help="small layers, one photo and one step")
    options = parser.parse_args(argv)
    if options.toy:
        measured = [*linears({"toy": (48, 256)}, options.tokens)]
        measured += drifts(names=("cat",), edits=("grayscale",), size=(64, 64), steps=1)
    else:
        measured = [*linears(linear_shapes(), options.tokens), *drifts()]
    common = origin()
    text = "".join(json.dumps(line | common) + "\n" for line in measured)

    def write(place: Path) -> None:
        place.write_text(text, encoding="utf-8")

    write_whole(options.json, write)
    sys.stdout.write(fidelity_table(measured) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
