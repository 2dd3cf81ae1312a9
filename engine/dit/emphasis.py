"""How much the reference tokens weigh on the text and the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.attention import attend, attend_weighted


@dataclass(frozen=True)
class Run:
    """Reference tokens that follow one another and weigh alike.

    Attributes:
        count: tokens.
        gain: added to the attention logits of these keys; a float, or floats [count] for one per token.
        factor: of these keys, after norm and rotation; the values are not scaled.
    """

    count: int
    gain: float | torch.Tensor = 0.0
    factor: float = 1.0

    @property
    def neutral(self) -> bool:
        """These tokens weigh as the model was trained."""
        return isinstance(self.gain, float) and self.gain == 0 and self.factor == 1


@dataclass(frozen=True)
class Emphasis:
    """Gains and factors of all reference keys, felt by the queries of text and target alone.

    Attributes:
        runs: in the order of the reference tokens, which are the last of the joint sequence.
    """

    runs: tuple[Run, ...]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Emphasis | None:
        """The emphasis, or None where every token weighs as trained: attention then runs as without references."""
        return None if all(run.neutral for run in runs) else cls(tuple(runs))

    @property
    def tokens(self) -> int:
        """Reference tokens."""
        return sum(run.count for run in self.runs)

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mode: str) -> torch.Tensor:
        """Attention of all tokens: [batch, tokens, heads, head_dim] each, to [batch, tokens, dim].

        Args:
            queries: of [text, target, references].
            keys: the same; the reference keys are scaled in place once the references have read them.
            values: the same.
            mode: of ``kernels.attention``.
        """
        leading = queries.shape[1] - self.tokens
        references = attend(queries[:, leading:], keys, values, mode=mode)
        return torch.cat([self.attend_leading(queries[:, :leading], keys, values, mode), references], dim=1)

    def attend_leading(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mode: str
    ) -> torch.Tensor:
        """Attention of text or target queries: [batch, n, heads, head_dim] to [batch, n, dim].

        Args:
            queries: of any tokens but references.
            keys: of [text, target, references]; the reference keys are scaled in place.
            values: the same tokens.
            mode: of ``kernels.attention``.
        """
        start = keys.shape[1] - self.tokens
        gains: list[tuple[int, float | torch.Tensor]] = [(start, 0.0)]
        for run in self.runs:
            if run.factor != 1:
                keys[:, start : start + run.count] *= run.factor
            start += run.count
            gains.append((run.count, run.gain))
        return attend_weighted(queries, keys, values, gains, mode=mode)
