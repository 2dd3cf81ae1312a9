"""Prompts and pictures to conditioning: Qwen2.5-VL over a tape of layers, without a language head."""

from __future__ import annotations

from .prompt import Counters, PromptEncoder

__all__ = ["Counters", "PromptEncoder"]
