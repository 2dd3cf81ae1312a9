"""A click command made from the table of flags: sections in the help, other tools' spellings on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .expand import expand
from .options import Flag, flags_by_spelling

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Command(click.Command):
    """One command: its words are expanded first, its flags are shown in sections.

    Args:
        name: the command's name.
        callback: called with the values by name.
        sections: flags by the title they stand under in the help.
        arguments: (name, metavar, many) of each positional argument.
        help: the help text.
    """

    def __init__(
        self,
        name: str,
        callback: Callable[..., Any],
        sections: Mapping[str, Sequence[Flag]],
        arguments: Sequence[tuple[str, str, bool]] = (),
        help: str = "",
    ) -> None:
        self.sections = sections
        self.flags = flags_by_spelling(sections.values())
        parameters: list[click.Parameter] = [
            click.Argument([key], metavar=metavar, nargs=-1 if many else 1, required=not many)
            for key, metavar, many in arguments
        ]
        parameters += [flag.option() for flags in sections.values() for flag in flags]
        super().__init__(name, callback=callback, params=parameters, help=help, context_settings=SETTINGS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Expand lists and spellings, then parse."""
        return super().parse_args(ctx, expand(args, self.flags))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per title; the left column shows a flag's own names only."""
        for title, flags in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([_help_row(flag) for flag in flags])


def _help_row(flag: Flag) -> tuple[str, str]:
    names = f"{flag.short}, {flag.name}" if flag.short else flag.name
    if flag.takes_value:
        names += " " + (flag.metavar or "|".join(flag.choices) or flag.kind.upper())
    also = f" [also {', '.join(flag.also)}]" if flag.also else ""
    return names, flag.help + also


class Group(click.Group):
    """The root: an unknown command is answered with the nearest known one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command named by the first word."""
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            from difflib import get_close_matches

            raise UnknownCommand(word, get_close_matches(word, list(self.commands)))
        return super().resolve_command(ctx, args)


class UnknownCommand(click.UsageError):
    """The first word names no command."""

    def __init__(self, word: str, near: Sequence[str]) -> None:
        super().__init__(f"command must be one of those in `qengine --help`, got {word!r}")
        self.possibilities = list(near)
