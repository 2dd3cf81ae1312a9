"""Errors, Ctrl-C and closed pipes end in one message and the right exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from qengine import errors

FAKE = Path(__file__).with_name("fake_engine.py")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.KernelError("a must be b, got c"), 1),
        (errors.RequestError("a must be b, got c", hint="do d"), 2),
        (errors.InputError("a must be b, got c"), 3),
        (errors.OutputError("a must be b, got c"), 3),
        (errors.CheckpointError("a must be b, got c"), 4),
        (errors.PlanError("a must be b, got c"), 5),
        (errors.MemoryLadderError("a must be b, got c"), 6),
        (errors.DeviceError("a must be b, got c"), 7),
        (errors.BatchError("a must be b, got c"), 8),
    ],
)
def test_every_error_has_its_exit_code_and_form(engine, run, error: errors.QEngineError, code: int) -> None:
    engine.error = error
    got, out, err = run("edit", "photo.png", "x", "-q")
    assert (got, out) == (code, "")
    assert err == f"error: {error.message}\n" + (f"\nhint: {error.hint}\n" if error.hint else "")
    assert engine.closed


def test_memory_that_ran_out_is_code_6(engine, run) -> None:
    engine.error = MemoryError()
    code, _, err = run("edit", "photo.png", "x")
    assert code == 6 and "memory ran out" in err


def test_an_unforeseen_error_is_internal_and_its_traceback_is_for_debug_only(engine, run) -> None:
    engine.error = ValueError("odd\nthing")
    code, _, err = run("edit", "photo.png", "x")
    assert code == 1 and "internal error, ValueError: odd thing" in err and "Traceback" not in err and "--debug" in err
    assert "Traceback" in run("edit", "photo.png", "x", "--debug")[2]


@pytest.mark.parametrize("error", [errors.Cancelled("stopped"), KeyboardInterrupt()])
def test_a_cancelled_run_is_130_and_leaves_nothing(engine, run, folder: Path, error: BaseException) -> None:
    engine.error = error
    code, out, err = run("edit", "photo.png", "x", "-q")
    assert (code, out, err) == (130, "", "cancelled\n")
    assert engine.closed
    assert not list(folder.glob("photo_edited*"))


def test_pictures_made_before_the_cancel_stay_whole(engine, run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = engine.stream

    def second_fails(request):
        if request.seed == 1:
            raise KeyboardInterrupt
        return stream(request)

    monkeypatch.setattr(engine, "stream", second_fails)
    code, out, _ = run("edit", "photo.png", "x", "-n", "2", "-o", "out.png")
    assert (code, out) == (130, "out_0.png\n")
    assert engine.cancelled
    assert sorted(path.name for path in folder.glob("out*")) == ["out_0.png"]


def test_the_signal_handler_is_put_back(engine, run) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run("edit", "photo.png", "x")[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(FAKE), *words],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="a console signal cannot be sent to one process there")
@pytest.mark.parametrize("phase", ["open", "encode", "denoise", "decode", "write"])
def test_ctrl_c_in_every_phase_is_130_without_an_output_file(folder: Path, phase: str) -> None:
    process = start(folder, "edit", "photo.png", "x", "-o", "out.png", QENGINE_FAKE_SLOW=phase)
    with process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line == f"at {phase}\n":
                break
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(timeout=60) == 130
        assert err.endswith("cancelled\n") and "Traceback" not in err
        assert process.stdout.read() == ""
    assert sorted(path.name for path in folder.iterdir()) == ["other.png", "photo.png"]


def test_a_reader_that_leaves_is_no_error(folder: Path) -> None:
    process = start(folder, "edit", "photo.png", "x", "-n", "3")
    with process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in err and "BrokenPipe" not in err and "Exception ignored" not in err
