"""Shell completion for bash, zsh, fish and PowerShell."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class, get_completion_class

from ..errors import RequestError
from .boundary import COMPLETE_VARIABLE, PROGRAM

SHELLS = ("bash", "zsh", "fish", "powershell")
ALIASES = {"pwsh": "powershell"}

_POWERSHELL = """\
Register-ArgumentCompleter -Native -CommandName %(prog_name)s -ScriptBlock {
    param($wordToComplete, $commandAst, $cursorPosition)
    $env:%(complete_var)s = "powershell_complete"
    $env:COMP_WORDS = ($commandAst.CommandElements | Select-Object -Skip 1 | ForEach-Object { "$_" }) -join "`n"
    $env:COMP_INCOMPLETE = $wordToComplete
    try {
        %(prog_name)s | ForEach-Object {
            $value, $help = $_ -split "`t", 2
            [System.Management.Automation.CompletionResult]::new($value, $value, "ParameterValue", $help)
        }
    } finally {
        Remove-Item Env:%(complete_var)s, Env:COMP_WORDS, Env:COMP_INCOMPLETE
    }
}
"""


class PowerShellComplete(ShellComplete):
    """PowerShell 5 and later; the words arrive one per line."""

    name: ClassVar[str] = "powershell"
    source_template: ClassVar[str] = _POWERSHELL

    def get_completion_args(self) -> tuple[list[str], str]:
        """The finished words, and the one being typed."""
        words = os.environ.get("COMP_WORDS", "").split("\n")
        incomplete = os.environ.get("COMP_INCOMPLETE", "")
        if incomplete and words and words[-1] == incomplete:
            words.pop()
        return [word for word in words if word], incomplete

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """One value, a tab, its help."""
        return f"{item.value}\t{item.help or item.value}"


def answer(group: click.Group, instruction: str) -> int:
    """Do what the shell asks through the environment, e.g. ``bash_complete``; returns the exit code."""
    from click.shell_completion import shell_complete

    add_completion_class(PowerShellComplete)
    return shell_complete(group, {}, PROGRAM, COMPLETE_VARIABLE, instruction)


def script(group: click.Group, shell: str) -> str:
    """The text to evaluate in a shell's start-up file.

    Raises:
        RequestError: the shell is not one of :data:`SHELLS`.
    """
    add_completion_class(PowerShellComplete)
    maker = get_completion_class(ALIASES.get(shell, shell))
    if maker is None or ALIASES.get(shell, shell) not in SHELLS:
        raise RequestError(f"shell must be one of {', '.join(SHELLS)}, got {shell!r}")
    return maker(group, {}, PROGRAM, COMPLETE_VARIABLE).source()
