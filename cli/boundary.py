"""The outermost frame of a command line: Ctrl-C, broken pipes, errors and exit codes end here."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import click

from ..errors import QEngineError
from .report import CANCELLED_CODE, print_error

COMPLETE_VARIABLE = "_QENGINE_COMPLETE"
PROGRAM = "qengine"


class Interrupt:
    """Remembers that Ctrl-C was pressed, for the case that a library turns KeyboardInterrupt into something else."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.seen = True
        raise KeyboardInterrupt


def run(argv: Sequence[str] | None) -> int:
    """Run one command line to its exit code; nothing but the interpreter's own end escapes."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    interrupt = Interrupt()
    try:
        with _handling(interrupt):
            code = _invoke(words)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _cancelled()
    except BrokenPipeError:
        return _reader_left()
    except (QEngineError, click.ClickException) as error:
        return print_error(error, debug=debug)
    except Exception as error:  # noqa: BLE001  the one place where an unforeseen error is put into words
        return _cancelled() if interrupt.seen else print_error(error, debug=debug)


def _invoke(words: list[str]) -> int:
    from .app import root

    group = root()
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from .completion import answer

        return answer(group, instruction)
    try:
        with group.make_context(PROGRAM, words) as context:
            return group.invoke(context) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code


@contextlib.contextmanager
def _handling(interrupt: Interrupt) -> Iterator[None]:
    """Install the handler where Python's own stands (an inherited "ignore" is kept), and put the old one back."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _cancelled() -> int:
    print("cancelled", file=sys.stderr)
    return CANCELLED_CODE


def _reader_left() -> int:
    """The reader of stdout has gone: say nothing, and keep the interpreter from flushing into the closed pipe."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
