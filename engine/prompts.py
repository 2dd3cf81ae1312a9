"""Help with words: prompt templates, and what is known to go wrong with a prompt. Needs no torch."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RequestError

TEMPLATES: Mapping[str, str] = {
    "character": "{name}, wearing {costume}, {pose}, {background}, {lighting}, {aesthetic}",
    "professional": "{role}, {attire}, {setting}, {lighting}, {mood}",
    "cinematic": "{scene}, {costume}, {environment}, {lighting}, {film_style}",
}
"""Patterns that keep a person's identity; every field must be filled."""

FEW_WORDS = 4
LONG_WORDS = 200

_DARK = r"\b(dark|darkness|dim|dimly|pitch[- ]black|unlit|shadowy|candlelit|moonless|gloomy)\b"
_LIGHT = r"\b(light\w*|lit|bright\w*|sun\w*|neon|glow\w*|golden hour|daylight|backlit|lamp\w*|spotlight\w*)\b"
_PERSON = r"\b(person|man|woman|boy|girl|face|portrait|headshot|him|her|he|she|selfie|people|character|actor|speaker)\b"
_GLASSES = r"\b(glasses|spectacles|sunglasses|eyewear|goggles)\b"
_FACE_SHAPE = r"\b(younger|older|child|baby|fat|thin|slim|obese|zombie|alien|robot|cartoon|caricature)\b"
_CONCRETE = (
    r"\b(wear\w*|background|standing|sitting|running|walking|holding|in an?|on an?|with|make|turn|change|remove|add)\b"
)


@dataclass(frozen=True)
class _Rule:
    """A case: what must be found, what must not, and what to say."""

    name: str
    needs: str
    unless: str
    says: str


_RULES = (
    _Rule(
        "too dark", _DARK, _LIGHT, "a dark scene loses the identity of faces; name a light: dramatic, golden hour, neon"
    ),
    _Rule("glasses", _PERSON, _GLASSES, "if the person wears glasses, say so, or they may go"),
    _Rule("face shape", _FACE_SHAPE, r"(?!)", "a change of age, build or species changes the face; identity may drift"),
)


def fill(template: str, fields: Mapping[str, str]) -> str:
    """A template with its fields filled.

    Args:
        template: a name in ``TEMPLATES``.
        fields: text by field name.

    Raises:
        RequestError: no such template, or fields that are missing, empty or unknown.
    """
    if template not in TEMPLATES:
        raise RequestError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    wanted = template_fields(template)
    missing = [name for name in wanted if not fields.get(name, "").strip()]
    unknown = sorted(set(fields) - set(wanted))
    if missing or unknown:
        said = [f"{', '.join(missing)} missing"] if missing else []
        said += [f"{', '.join(unknown)} unknown"] if unknown else []
        raise RequestError(
            f"template {template} must get {', '.join(wanted)}, got {' and '.join(said)}",
            hint=f"--fill {(missing or list(wanted))[0]}='...'",
        )
    return TEMPLATES[template].format_map(dict(fields))


def template_fields(template: str) -> tuple[str, ...]:
    """Names of a template's fields, in order."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(TEMPLATES[template]) if name)


def hints(prompt: str) -> tuple[str, ...]:
    """What is known to go wrong with a prompt like this, one sentence each; nothing is changed.

    Cases: too dark, vague, a bare name without context, glasses, changes of the face.
    """
    text = prompt.strip().lower()
    words = re.findall(r"\w[\w'-]*", prompt)
    found = [
        f"{rule.name}: {rule.says}"
        for rule in _RULES
        if re.search(rule.needs, text) and not re.search(rule.unless, text)
    ]
    if _bare_name(prompt, words):
        found.insert(0, "missing context: a title alone says little; describe costume, place and light")
    elif len(words) < FEW_WORDS and not re.search(_CONCRETE, text):
        found.insert(0, "vague: name what is to be seen, where, and in which light")
    if len(words) > LONG_WORDS:
        found.append(f"long: {len(words)} words; the first sentences weigh most")
    return tuple(found)


def _bare_name(prompt: str, words: list[str]) -> bool:
    """Up to five words, all but small ones capitalised, and nothing said of how it looks."""
    named = [word for word in words if len(word) > 3 or word[:1].isupper()]
    return (
        1 < len(words) <= 5
        and all(word[:1].isupper() or word[:1].isdigit() for word in named)
        and not re.search(_CONCRETE, prompt.lower())
    )
