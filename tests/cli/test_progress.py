"""Progress on a terminal, and numbers in words."""

from __future__ import annotations

import io

import pytest
from qengine.cli.meter import ReadMeter
from qengine.cli.outputs import Wish, choose
from qengine.cli.progress import LiveDisplay, PlainDisplay, Talk, make_display
from qengine.cli.words import bytes_text, seconds_text, table
from qengine.errors import RequestError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_bar_and_a_pipe_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    display = make_display(quiet=False)
    assert isinstance(display, LiveDisplay)
    display.close()
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert isinstance(make_display(quiet=False), PlainDisplay)


def test_the_live_bar_leaves_one_line_per_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    display = LiveDisplay(screen)
    display.start("denoise", 2)
    display.step(1, "0.1 s/step [eta]")
    display.line("note: [bold]kept[/bold]")
    display.end("2 steps")
    display.close()
    text = screen.getvalue()
    assert "denoise  2 steps\n" in text and "[bold]kept[/bold]" in text
    assert "\x1b[1m" not in text and "\x1b[3" not in text
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25l" not in text


def test_quiet_has_no_display_and_detail_is_for_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    Talk(quiet=True).say("a")
    Talk().detail("b")
    Talk(verbose=True).detail("c")
    assert capsys.readouterr().err == "c\n"


def test_numbers_are_written_for_people() -> None:
    assert [bytes_text(count) for count in (0, 1023, 1536, 11 << 20, 300 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "11.0 MiB",
        "300 GiB",
    ]
    assert [seconds_text(seconds) for seconds in (0.034, 12.34, 135)] == ["0.03 s", "12.3 s", "2 min 15 s"]
    assert table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"


def test_an_empty_output_name_is_refused() -> None:
    with pytest.raises(RequestError, match="output must be a file or a folder"):
        choose(Wish(" ", None, "images", "x"), [0])


def test_bytes_read_inside_a_phase_are_said_when_they_grow() -> None:
    screen = io.StringIO()
    display, read = PlainDisplay(screen), [0]
    display.start("encode")
    with ReadMeter(display, lambda: read[0]) as meter:
        meter.look()
        read[0] = 3 << 30
        meter.look()
        meter.look()
    assert screen.getvalue() == "encode   3.0 GiB read\n"


def test_bytes_read_after_a_phase_ended_do_not_break_the_bar() -> None:
    display = LiveDisplay(Terminal())
    display.reading("1 GiB read")
    display.start("encode")
    display.reading("1 GiB read")
    display.end("done")
    display.reading("2 GiB read")
    display.close()
