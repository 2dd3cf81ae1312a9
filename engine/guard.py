"""Whether a result is finite, asked of the device without stopping it."""

from __future__ import annotations

import torch


class Finite:
    """A flag that the device sets behind the work that made a tensor, and the host reads when it needs it.

    On CUDA the answer is copied into page-locked memory and an event marks it; nothing waits until :meth:`read`, which
    waits for that event alone. On a CPU the answer is there at once.

    Args:
        x: any floats, on the current stream.
    """

    def __init__(self, x: torch.Tensor) -> None:
        answer = torch.isfinite(x).all()
        self._event: torch.cuda.Event | None = None
        if x.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._host.copy_(answer, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = answer

    def read(self) -> bool:
        """Whether every element is finite."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._host)
