"""One option of the command line, and how its spellings are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

KINDS: dict[str, Any] = {"text": click.STRING, "int": click.INT, "float": click.FLOAT}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One option of the command line.

    Attributes:
        name: the long spelling, with hyphens; also the name of its value.
        help: one sentence.
        short: one-letter spelling, or "".
        also: further spellings that mean the same, as other tools write them.
        kind: ``text``, ``int``, ``float``, ``switch`` or ``count``.
        choices: the only values taken, or () for any.
        metavar: the placeholder in the help.
        many: may be repeated; one spelling may be followed by several values.
        words: number of words that make up the one value.
        accepts: pattern of the words that can stand in a list of values; "" for any, up to the prompt.
    """

    name: str
    help: str
    short: str = ""
    also: tuple[str, ...] = ()
    kind: str = "text"
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    many: bool = False
    words: int = 1
    accepts: str = ""

    @property
    def key(self) -> str:
        """Name of the value in Python: ``--true-cfg-scale`` is ``true_cfg_scale``."""
        return self.name.removeprefix("--").replace("-", "_")

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every accepted spelling, with hyphens."""
        long = (self.name, *(hyphenated(word) for word in self.also))
        return tuple(dict.fromkeys((self.short, *long) if self.short else long))

    @property
    def takes_value(self) -> bool:
        """Whether a value follows the flag."""
        return self.kind not in ("switch", "count")

    def option(self) -> click.Option:
        """The click option of this flag."""
        shown: dict[str, Any] = {"help": self.help}
        if self.kind == "switch":
            shown.update(is_flag=True)
        elif self.kind == "count":
            shown.update(count=True)
        else:
            value_type = click.Choice(self.choices) if self.choices else KINDS[self.kind]
            shown.update(type=value_type, metavar=self.metavar, multiple=self.many)
        return click.Option([*self.spellings, self.key], **shown)


def hyphenated(word: str) -> str:
    """``--true_cfg_scale`` as ``--true-cfg-scale``; a value after ``=`` is left alone."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
