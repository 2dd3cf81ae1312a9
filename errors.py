"""The one error tree of qengine; it stands below every room.

    QEngineError                 exit code 1
    ├── KernelError              1   an op was called with tensors it does not take
    ├── RequestError             2   what was asked makes no sense (usage)
    │   └── UnloadedError        2   an extractor was asked after it was unloaded (engine.vl)
    ├── InputError               3   a picture, mask or other input file is missing or bad
    ├── OutputError              3   a result cannot be written where it was asked
    ├── CheckpointError          4   a model is missing, incomplete, altered or of another kind
    ├── PlanError                5   the request does not fit the stated ceilings
    ├── MemoryLadderError        6   out of memory after every allowed retry
    ├── DeviceError              7   no usable device of the asked kind
    ├── BatchError               8   some jobs of a batch failed
    └── Cancelled              130   the user or the embedding program stopped the run

Every message reads ``<subject> must be <expected>, got <value>``; a hint, if there is one, names one action.
"""

from __future__ import annotations


class QEngineError(Exception):
    """Root of all errors raised on purpose.

    Args:
        message: what is wrong, in the form ``<subject> must be <expected>, got <value>``.
        hint: the one next action, without the word "hint".
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class KernelError(QEngineError):
    """An op was called with a dtype, shape or device that it does not take."""


class RequestError(QEngineError):
    """The request is contradictory or out of range."""

    exit_code = 2


class InputError(QEngineError):
    """An input file is missing, unreadable or not what it claims to be."""

    exit_code = 3


class OutputError(QEngineError):
    """A result cannot be written at the asked place."""

    exit_code = 3


class CheckpointError(QEngineError):
    """A model is missing, incomplete, altered or of another kind than asked."""

    exit_code = 4


class PlanError(QEngineError):
    """The request does not fit the stated ceilings."""

    exit_code = 5


class MemoryLadderError(QEngineError):
    """Memory ran out after every allowed retry."""

    exit_code = 6


class DeviceError(QEngineError):
    """No usable device of the asked kind."""

    exit_code = 7


class BatchError(QEngineError):
    """Some jobs of a batch failed."""

    exit_code = 8


class Cancelled(QEngineError):
    """The run was stopped by the user or by the embedding program."""

    exit_code = 130
