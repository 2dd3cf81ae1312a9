"""The prompt templates that the checkpoints were trained with, and how pictures stand in them."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from ...errors import RequestError

IMAGE_TOKEN = "<|image_pad|>"
MAX_PROMPT_TOKENS = 1024

_RESERVED = (IMAGE_TOKEN, "<|video_pad|>")
_PLACEHOLDER = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)


@dataclass(frozen=True)
class PromptTemplate:
    """One chat of a system message, pictures and the prompt.

    Attributes:
        name: ``text``, ``edit`` or ``edit-plus``.
        system: the system message.
        label: what stands for picture ``k`` (from 1), with ``{}`` for the number; empty where there are no pictures.
        drop_tokens: leading tokens whose hidden states are not part of the conditioning.
        min_pictures: fewest pictures.
        max_pictures: most pictures; None is no limit.
    """

    name: str
    system: str
    label: str
    drop_tokens: int
    min_pictures: int
    max_pictures: int | None

    def text(self, prompt: str, picture_count: int) -> str:
        """The whole chat as text, one placeholder token per picture.

        Raises:
            RequestError: the number of pictures does not fit, or the prompt holds a placeholder itself.
        """
        self._check(prompt, picture_count)
        pictures = "".join(self.label.format(k + 1) for k in range(picture_count))
        return (
            f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n{pictures}{prompt}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def _check(self, prompt: str, picture_count: int) -> None:
        most = picture_count if self.max_pictures is None else self.max_pictures
        if not self.min_pictures <= picture_count <= most:
            wanted = f"{self.min_pictures}" if most == self.min_pictures else f"{self.min_pictures} or more"
            raise RequestError(f"pictures of the {self.name} template must be {wanted}, got {picture_count}")
        for token in _RESERVED:
            if token in prompt:
                raise RequestError(
                    f"prompt must be free of the placeholder {token}, got it at character {prompt.index(token)}",
                    hint=f"leave {token} out of the prompt",
                )


TEMPLATES = MappingProxyType(
    {
        "text": PromptTemplate("text", _DESCRIBE, "", 34, 0, 0),
        "edit": PromptTemplate("edit", _EDIT, _PLACEHOLDER, 64, 1, 1),
        "edit-plus": PromptTemplate("edit-plus", _EDIT, "Picture {}: " + _PLACEHOLDER, 64, 0, None),
    }
)


def prompt_template(name: str) -> PromptTemplate:
    """The template of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in TEMPLATES:
        raise RequestError(f"prompt template must be one of {', '.join(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]
