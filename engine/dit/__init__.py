"""The Qwen-Image transformer: rotary positions, modulation table, block, model."""

from .emphasis import Emphasis, Run
from .model import Branch, DiTConfig, QwenImageTransformer
from .modulation import ModulationRows, ModulationTable
from .rope import Grid

__all__ = [
    "Branch",
    "DiTConfig",
    "Emphasis",
    "Grid",
    "ModulationRows",
    "ModulationTable",
    "QwenImageTransformer",
    "Run",
]
