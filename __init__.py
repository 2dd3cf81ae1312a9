"""qengine: image editing and generation with Qwen-Image models inside the memory you have.

Public names are loaded on first use, so importing the package starts neither torch nor CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .engine.events import Decoded, Encoded, Result, Step
    from .engine.keep.options import Keep
    from .engine.pipeline import ZImagePipeline
    from .engine.plan import Budget, Choices, Plan
    from .engine.qx import JobFile, read_job, request_of, write_job
    from .engine.request import EditRequest, GenerateRequest
    from .engine.session import Engine
    from .engine.state import RunState
    from .engine.vl import (
        VLEmbeddingExtractor,
        blend_adain,
        blend_adain_per_dim,
        blend_embeddings,
        blend_interpolate,
        blend_with_style_delta,
        compute_style_delta,
        get_outlier_dimensions,
        mask_outlier_dimensions,
    )
    from .errors import QEngineError

_HOMES = {
    "Engine": "engine.session",
    "EditRequest": "engine.request",
    "GenerateRequest": "engine.request",
    "Encoded": "engine.events",
    "Step": "engine.events",
    "Decoded": "engine.events",
    "Result": "engine.events",
    "RunState": "engine.state",
    "Budget": "engine.plan",
    "Choices": "engine.plan",
    "Plan": "engine.plan",
    "QEngineError": "errors",
    "Keep": "engine.keep.options",
    "ZImagePipeline": "engine.pipeline",
    "JobFile": "engine.qx",
    "read_job": "engine.qx",
    "request_of": "engine.qx",
    "write_job": "engine.qx",
    "VLEmbeddingExtractor": "engine.vl",
    "blend_adain": "engine.vl",
    "blend_adain_per_dim": "engine.vl",
    "blend_embeddings": "engine.vl",
    "blend_interpolate": "engine.vl",
    "blend_with_style_delta": "engine.vl",
    "compute_style_delta": "engine.vl",
    "get_outlier_dimensions": "engine.vl",
    "mask_outlier_dimensions": "engine.vl",
}

__all__ = [
    "Budget",
    "Choices",
    "Decoded",
    "EditRequest",
    "Encoded",
    "Engine",
    "GenerateRequest",
    "JobFile",
    "Keep",
    "Plan",
    "QEngineError",
    "Result",
    "RunState",
    "Step",
    "VLEmbeddingExtractor",
    "ZImagePipeline",
    "blend_adain",
    "blend_adain_per_dim",
    "blend_embeddings",
    "blend_interpolate",
    "blend_with_style_delta",
    "compute_style_delta",
    "get_outlier_dimensions",
    "mask_outlier_dimensions",
    "read_job",
    "request_of",
    "write_job",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
