"""The ladder: what is done when memory runs out in a phase."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

from ..errors import MemoryLadderError, PlanError, RequestError
from .ceiling import Ceiling, is_out_of_memory
from .plan import Budget, Choices, JobFacts, ModelFacts, Plan, make_plan

RETRIES = 3

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Shrinking(Protocol):
    """What holds weights and can hold fewer."""

    def shrink(self, phase: str) -> str:
        """Make room after an out-of-memory error, and say what was done."""
        ...

    def release(self) -> None:
        """Free all weights."""
        ...


class Ladder:
    """Works under a ceiling; an out-of-memory error is retried with fewer resident blocks, at most three times.

    A retry gives the same bits: a phase reads its inputs and returns its result, and placement changes neither kernels
    nor tiles.

    Args:
        components: what can be made smaller.
        ceiling: what to work inside of.

    Attributes:
        notes: what was told, in order: one sentence per retry, and what steps said of themselves.
    """

    def __init__(self, components: Shrinking, ceiling: Ceiling) -> None:
        self._components = components
        self._ceiling = ceiling
        self.notes: list[str] = []

    def climb(self, phase: str, work: Callable[[], T], fitting: Callable[[], str]) -> T:
        """The result of ``work``.

        Args:
            phase: ``encode``, ``reference``, ``denoise`` or ``decode``.
            work: may run several times.
            fitting: what would fit, for the error's hint.

        Raises:
            MemoryLadderError: memory ran out again after every retry.
        """
        fault = ""
        for attempt in range(1 + RETRIES):
            if attempt:
                self._shrink(phase)
            try:
                with self._ceiling():
                    return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                fault = str(error).partition("\n")[0]
        self._components.release()
        raise MemoryLadderError(
            f"memory must be enough to {phase} after {RETRIES} retries, got: {fault}", hint=fitting()
        )

    def tell(self, *words: str) -> None:
        """Keep sentences for the notes of the result, and log them."""
        for sentence in words:
            self.notes.append(sentence)
            logger.info("%s", sentence)

    def _shrink(self, phase: str) -> None:
        self.tell(self._components.shrink(phase))


def what_would_fit(model: ModelFacts, job: JobFacts, plan: Plan, budget: Budget, choices: Choices) -> str:
    """A line to paste whose plan needs less than the one that failed.

    First every block streamed under the same ceilings; where that was the plan, the ceiling that it would need with a
    sixteenth to spare.
    """
    leaner = replace(choices, offload="sequential", blocks_to_swap=None)
    with contextlib.suppress(PlanError):
        found = make_plan(model, job, budget, plan.device, leaner)
        if found.vram_bytes < plan.vram_bytes:
            return found.command
    needed = plan.vram_bytes + plan.vram_bytes // 16
    return f"give at least {needed / 2**30:.2f} GiB (--vram), or ask for a smaller --size"


class Turn:
    """One run at a time; whoever comes second waits or is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextlib.contextmanager
    def take(self, *, wait: bool) -> Iterator[None]:
        """Hold the turn.

        Args:
            wait: wait for the run under way, unless this very thread runs it.

        Raises:
            RequestError: a run is under way.
        """
        mine = self._owner == threading.get_ident()
        if not self._lock.acquire(blocking=wait and not mine):
            raise RequestError(
                "an engine must run one request at a time, got a second", hint="finish or close the first"
            )
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()
