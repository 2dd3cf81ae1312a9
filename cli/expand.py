"""The pre-parser: other tools' ways of writing a command line, made into the one that click reads.

Three things are changed and nothing else: underscores in flag names become hyphens; a list after a flag
(``--control_image_path a b c``) becomes a repeated flag; the words of one value (``--image_size 768 1376``) become one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .flag import Flag, hyphenated

PICTURE_SUFFIXES = frozenset(".png .jpg .jpeg .webp .tif .tiff .bmp .gif .avif .heic .jp2 .ppm .tga .ico".split())


def looks_like_picture(word: str) -> bool:
    """Whether a word is named as a picture file; decides between IMAGE and PROMPT."""
    dot = word.rfind(".")
    return dot > 0 and word[dot:].lower() in PICTURE_SUFFIXES


def expand(words: Sequence[str], flags: Mapping[str, Flag]) -> list[str]:
    """Rewrite the words after a command's name.

    Without ``-p/--prompt`` the last bare word is the prompt, so a list flag stops before it.

    Args:
        words: the command line after the command's name.
        flags: the command's flags by spelling.
    """
    words, rest = _split_at_double_dash(words)
    words = [hyphenated(word) if word.startswith("--") else word for word in words]
    reserved = -1 if rest else _prompt_position(words, flags)
    out: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        flag = flags.get(word)
        if flag is not None and flag.many:
            end = _values_end(words, position + 1, reserved, flag)
            values = words[position + 1 : end]
            out += [part for value in values for part in (word, value)] or [word]
        elif flag is not None and flag.words > 1:
            end = _list_end(words[: position + 1 + flag.words], position + 1, -1)
            out += [word, " ".join(words[position + 1 : end])] if end > position + 1 else [word]
        else:
            end = position + (2 if flag is not None and flag.takes_value else 1)
            out += words[position:end]
        position = end
    return out + rest


def _split_at_double_dash(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return list(words), []
    cut = list(words).index("--")
    return list(words[:cut]), list(words[cut:])


def _is_flag(word: str) -> bool:
    return len(word) > 1 and word.startswith("-")


def _list_end(words: Sequence[str], start: int, reserved: int) -> int:
    end = start
    while end < len(words) and end != reserved and not _is_flag(words[end]):
        end += 1
    return end


def _values_end(words: Sequence[str], start: int, reserved: int, flag: Flag) -> int:
    """Where a list of values ends; where a pattern says what a value is, before the first word that is none."""
    if not flag.accepts:
        return _list_end(words, start, reserved)
    end = start
    while end < len(words) and end != reserved and re.fullmatch(flag.accepts, words[end]):
        end += 1
    return end


def _prompt_position(words: Sequence[str], flags: Mapping[str, Flag]) -> int:
    """Position of the last bare word, if it is to be the prompt, else -1."""
    last = -1
    position = 0
    while position < len(words):
        word = words[position]
        flag = flags.get(word.partition("=")[0])
        if flag is not None and flag.key == "prompt":
            return -1
        if flag is not None and "=" not in word and flag.takes_value and not flag.many:
            position += flag.words
        elif flag is not None and flag.accepts and "=" not in word:
            position = _values_end(words, position + 1, -1, flag) - 1
        elif not _is_flag(word):
            last = position
        position += 1
    return -1 if last >= 0 and looks_like_picture(words[last]) else last
