"""Errors in words: one message, one next action, the right exit code."""

from __future__ import annotations

import sys

import click

from ..errors import Cancelled, MemoryLadderError, QEngineError

USAGE_CODE = 2
CANCELLED_CODE = Cancelled.exit_code
INTERNAL_CODE = QEngineError.exit_code
MEMORY_CODE = MemoryLadderError.exit_code


def describe(error: BaseException) -> tuple[str, str | None, int]:
    """(message, hint, exit code) of an error."""
    if isinstance(error, QEngineError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, click.ClickException):
        return _usage_message(error), _usage_hint(error), USAGE_CODE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"memory ran out: {_one_line(error)}", "ask for a smaller --size or close other programs", MEMORY_CODE
    message = f"internal error, {type(error).__name__}: {_one_line(error)}"
    return message, "run the same command with --debug and report what it prints", INTERNAL_CODE


def print_error(error: BaseException, *, debug: bool) -> int:
    """Write an error to stderr and return its exit code.

    Args:
        error: what went wrong.
        debug: also write the traceback.
    """
    message, hint, code = describe(error)
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, Cancelled):
        text = "cancelled"
    else:
        text = f"error: {message}" + (f"\n\nhint: {hint}" if hint else "")
    print(text, file=sys.stderr)
    return code


def _usage_message(error: click.ClickException) -> str:
    name = getattr(error, "option_name", None)
    if isinstance(error, click.NoSuchOption) and name:
        return f"option must be one that this command has, got {name}"
    message = getattr(error, "message", None) if hasattr(error, "possibilities") else None
    text = (message or error.format_message()).strip()
    return text[0].lower() + text[1:].removesuffix(".") if text else "the command line cannot be read"


def _usage_hint(error: click.ClickException) -> str | None:
    near = getattr(error, "possibilities", None)
    if near:
        return f"did you mean {' or '.join(near)}?"
    context = getattr(error, "ctx", None)
    return f"`{context.command_path if context else 'qengine'} --help` lists what can be asked"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"
