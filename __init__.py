"""qengine: image editing and generation with Qwen-Image models inside the memory you have.

Public names are loaded on first use, so importing the package starts neither torch nor CUDA.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .engine.events import Decoded, Encoded, Result, Step
    from .engine.plan import Budget, Choices, Plan
    from .engine.request import EditRequest, GenerateRequest
    from .engine.session import Engine
    from .engine.state import RunState
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
}

__all__ = [
    "Budget",
    "Choices",
    "Decoded",
    "EditRequest",
    "Encoded",
    "Engine",
    "GenerateRequest",
    "Plan",
    "QEngineError",
    "Result",
    "RunState",
    "Step",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
