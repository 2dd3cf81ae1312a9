"""Counting the launches of a Triton kernel."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


class Counted:
    """A kernel that counts how often it is launched.

    Attributes:
        launches: how often it was launched.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.launches = 0

    def __getitem__(self, grid: Any) -> Any:
        launch = self._kernel[grid]

        def run(*arguments: Any, **options: Any) -> Any:
            self.launches += 1
            return launch(*arguments, **options)

        return run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


def counted(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> Counted:
    """Put a counting kernel in the place of ``module.name``."""
    made = Counted(getattr(module, name))
    monkeypatch.setattr(module, name, made)
    return made
