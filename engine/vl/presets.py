"""Settings that are known by name: recipes, what suits which style, and what each alpha does.

Source: the two guides that qengine's picture conditioning follows (issue 5); none has been measured here. The first
guide's style recipe keeps text rows only, the second says that this strips the picture; both stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ...errors import RequestError
from .knobs import BlendKnobs, Knobs

EXPERIMENTAL = "picture conditioning is experimental: visible artifacts are to be expected at any setting"
STEPS = 9
STRENGTH = 0.75


@dataclass(frozen=True)
class Recipe:
    """Settings of one use.

    Attributes:
        name: as in ``--recipe``.
        meaning: one sentence.
        knobs: from hidden states to embeddings.
        blend: from embeddings to conditioning.
        strength: of the noise on the initial picture; None starts from noise alone.
        steps: evaluations of the transformer in a whole schedule.
        text: what should be written beside the picture: ``prompt`` (the same), a kind of description, or None.
        same_image: the picture that is read is also the initial one.
    """

    name: str
    meaning: str
    knobs: Knobs = field(default_factory=Knobs)
    blend: BlendKnobs = field(default_factory=BlendKnobs)
    strength: float | None = None
    steps: int = STEPS
    text: str | None = "prompt"
    same_image: bool = False


@dataclass(frozen=True)
class Level:
    """What suits a style: alphas from least to most, and a strength."""

    alphas: tuple[float, float]
    strength: float


@dataclass(frozen=True)
class AlphaEffect:
    """What a range of alphas does, ends included."""

    least: float
    most: float
    use: str


_RECIPES = (
    Recipe(
        "style_transfer",
        "another subject in the style of a picture, painted over that picture",
        strength=0.9,
        same_image=True,
    ),
    Recipe(
        "style_transfer_adain",
        "as style_transfer, with the picture's statistics by column on the prompt's tokens",
        blend=BlendKnobs(mode="adain_per_dim"),
        strength=0.9,
        same_image=True,
    ),
    Recipe(
        "style_transfer_text",
        "style from the rows of a style description read after the picture",
        knobs=Knobs(token_selection="text", normalization_mode="global", target_std=70.0),
        blend=BlendKnobs(alpha=0.5),
        text="the style of the picture",
    ),
    Recipe(
        "variation",
        "pictures close to the reference",
        blend=BlendKnobs(alpha=0.5),
        text="an accurate description of the picture",
    ),
    Recipe(
        "composition",
        "the layout of a picture, the content of the prompt",
        knobs=Knobs(token_selection="image", normalization_mode="per_dim", target_std=70.0),
        blend=BlendKnobs(alpha=0.2),
        text=None,
    ),
    Recipe(
        "palette",
        "the colours of a picture",
        blend=BlendKnobs(alpha=0.15),
        text="the colours of the picture",
    ),
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})

COMPLEXITY: Mapping[str, Level] = MappingProxyType(
    {
        "simple": Level((0.3, 0.3), 0.9),
        "medium": Level((0.3, 0.5), 0.9),
        "complex": Level((0.5, 0.5), 0.9),
    }
)
"""Alpha and strength by style: simple is a flat cartoon, medium is anime, complex is photorealistic."""

ALPHA_EFFECTS = (
    AlphaEffect(0.0, 0.0, "text alone"),
    AlphaEffect(0.1, 0.2, "subtle hints of style"),
    AlphaEffect(0.3, 0.3, "recommended default"),
    AlphaEffect(0.4, 0.5, "strong style transfer"),
    AlphaEffect(0.6, 0.7, "composition of the picture kept"),
    AlphaEffect(0.8, 0.9, "near reproduction"),
    AlphaEffect(1.0, 1.0, "picture alone"),
)


def recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
        RequestError: there is none of this name.
    """
    try:
        return RECIPES[name]
    except KeyError:
        raise RequestError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}") from None
