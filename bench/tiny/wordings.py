"""What people may say for each edit: phrases to train on, and phrases held out to test on.

A held-out phrase shares words with the training phrases but is none of them, in no dressing: a model that has learned
the words gets it right, one that has learned the sentences does not.
"""

from __future__ import annotations

import random

OBJECTS = ("it", "this", "the image", "the photo", "the picture", "this image", "this photo", "this picture",
           "my photo", "the scene", "everything", "the whole image")  # fmt: skip
DRESSINGS = ("{}", "{}", "{}", "{}", "please {}", "{} please", "{}, please", "can you {}", "could you {}",
             "could you please {}", "i want you to {}", "i would like you to {}", "now {}", "just {}", "{} now",
             "edit: {}", "let's {}", "hey, {}", "{}, thanks", "can you please {} for me", "try to {}")  # fmt: skip
ENDINGS = ("", "", "", ".", "!", "?", " .")

TRAIN: dict[str, tuple[str, ...]] = {
    "keep": (
        "keep {o} as it is", "keep {o}", "leave {o} unchanged", "do nothing", "do not change anything", "keep it the same",
        "no change", "no changes", "leave {o} alone", "don't edit {o}", "don't change {o}", "return {o} unchanged",
        "keep {o} exactly the same", "copy {o}", "same image", "do not edit {o}", "keep the original", "show the original image",
        "leave everything as it is", "make no change", "an exact copy of {o}", "reproduce {o} without any edit", "keep",
        "leave {o} the way it is", "keep {o} unchanged", "do not touch {o}", "nothing to change",
    ),
    "grayscale": (
        "make {o} grayscale", "make {o} black and white", "convert {o} to grayscale", "turn {o} into a black and white photo",
        "remove the color", "remove all colors from {o}", "grayscale", "black and white", "desaturate {o}", "make {o} gray",
        "turn {o} gray", "make {o} monochrome", "convert {o} to black and white", "take the colour out of {o}",
        "a monochrome version of {o}", "make {o} colorless", "turn {o} into grayscale", "in black and white",
        "drop all the colours", "greyscale", "make {o} grey", "convert {o} to greyscale", "b&w", "make {o} b&w",
        "change {o} to monochrome", "strip the color from {o}", "gray image", "no color", "show {o} in grayscale",
    ),
    "invert": (
        "invert {o}", "invert the colors", "invert the colours of {o}", "make {o} a negative", "turn {o} into a negative",
        "negative", "make a photo negative", "reverse the colors", "show the negative of {o}", "invert all colors in {o}",
        "color inversion", "flip the colors to their opposites", "swap dark and light", "make dark parts light and light parts dark",
        "convert {o} to a film negative", "inverted colors", "opposite colors", "apply an invert effect to {o}",
        "give me the inverted version of {o}", "x-ray look", "complement every color", "create a negative image",
        "use inverted colours", "change {o} into its negative",
    ),
    "night": (
        "make it night", "turn {o} into night", "make {o} look like night", "make {o} a night scene", "change day to night",
        "night", "nighttime", "at night", "turn day into night", "make {o} very dark", "darken {o}", "make {o} darker",
        "convert {o} to a night shot", "show {o} at night", "make {o} look like it was taken at night", "midnight",
        "set {o} at midnight", "turn off the light", "night time version of {o}", "moonlight", "in the moonlight",
        "lower the brightness of {o}", "make the sky dark as at night", "dark night version", "change the time to night",
        "make {o} dark", "give {o} a night look",
    ),
    "bright": (
        "make {o} brighter", "brighten {o}", "make {o} bright", "increase the brightness", "increase brightness of {o}",
        "lighten {o}", "make {o} lighter", "more light", "add more light to {o}", "brighter", "bright", "raise the exposure of {o}",
        "turn up the brightness", "give {o} more brightness", "brighten up {o}", "lift the shadows", "make {o} much brighter",
        "{o} is too dark, brighten it", "turn on the light", "boost the brightness", "raise the brightness of {o}",
        "overexpose {o}", "higher exposure", "light up {o}", "make {o} light and bright", "a brighter version of {o}",
    ),
    "sepia": (
        "make {o} sepia", "sepia", "apply a sepia filter", "turn {o} into sepia", "sepia tone", "make {o} look old",
        "old photo look", "give {o} a sepia tone", "make {o} look like an old photo", "convert {o} to sepia", "vintage look",
        "make {o} vintage", "apply a vintage effect to {o}", "add a sepia effect", "antique photo", "make {o} look antique",
        "an old brown photograph", "sepia toned version of {o}", "in sepia", "retro photo look", "make {o} retro",
        "turn {o} into an old time photo", "use sepia colors", "age {o}", "change {o} to sepia tones",
    ),
    "swap": (
        "swap red and blue", "swap the red and blue channels", "exchange red and blue", "switch red and blue",
        "swap blue and red", "swap red with blue", "exchange the red and blue channels of {o}", "red and blue swapped",
        "switch the blue and red channels", "turn red into blue and blue into red", "make red things blue and blue things red",
        "interchange red and blue", "swap the channels", "rgb to bgr", "convert rgb to bgr", "bgr", "swap r and b",
        "channel swap", "trade red for blue and blue for red", "exchange blue with red in {o}", "swap the color channels of {o}",
        "replace red with blue and blue with red", "switch the red and blue colors", "bgr order",
    ),
    "warm": (
        "make {o} warmer", "make {o} warm", "warm up {o}", "warm", "warmer", "add warmth", "add warmth to {o}", "warm colors",
        "use warmer colors", "warm tone", "give {o} a warm tone", "golden hour", "make {o} look like golden hour", "sunset light",
        "make {o} look like sunset", "warm the colors of {o}", "a warmer white balance", "increase the color temperature",
        "apply a warm filter", "warm filter", "add a warm glow", "give {o} warm light", "warm sunlight", "make the tones warmer",
        "a warm version of {o}", "turn {o} warmer",
    ),
    "cool": (
        "make {o} cooler", "make {o} cool", "cool down {o}", "cool", "cooler", "make {o} cold", "make {o} colder", "cool colors",
        "use cooler colors", "cool tone", "give {o} a cool tone", "cold tone", "give {o} a cold look", "winter light",
        "make {o} look like winter", "cool the colors of {o}", "a cooler white balance", "lower the color temperature",
        "apply a cool filter", "cold filter", "cold light", "give {o} cool light", "an icy look", "make {o} icy", "make {o} look cold",
        "a cool version of {o}", "make the tones cooler",
    ),
    "contrast": (
        "increase the contrast", "increase contrast of {o}", "more contrast", "add contrast", "add more contrast to {o}",
        "boost the contrast", "higher contrast", "high contrast", "make {o} high contrast", "contrast", "raise the contrast of {o}",
        "stronger contrast", "give {o} more contrast", "turn up the contrast", "make {o} more contrasty", "make {o} punchy",
        "enhance the contrast of {o}", "make {o} pop", "a punchy version of {o}", "strong contrast", "improve the contrast in {o}",
        "make darks darker and lights lighter", "deepen the contrast", "more punch", "apply high contrast to {o}",
    ),
    "red": (
        "tint {o} red", "red tint", "add a red tint", "make {o} red", "make {o} reddish", "make {o} more red", "apply a red filter",
        "red filter", "color {o} red", "turn {o} red", "give {o} a red tint", "put a red filter on {o}", "wash {o} in red",
        "red overlay", "add a red overlay to {o}", "paint {o} red", "red light", "give {o} a red color cast", "red", "tint with red",
        "a red toned version of {o}", "cover {o} with red", "add red to {o}",
    ),
    "green": (
        "tint {o} green", "green tint", "add a green tint", "make {o} green", "make {o} greenish", "make {o} more green",
        "apply a green filter", "green filter", "color {o} green", "turn {o} green", "give {o} a green tint",
        "put a green filter on {o}", "wash {o} in green", "green overlay", "add a green overlay to {o}", "paint {o} green",
        "green light", "give {o} a green color cast", "green", "tint with green", "a green toned version of {o}",
        "cover {o} with green", "add green to {o}",
    ),
    "blue": (
        "tint {o} blue", "blue tint", "add a blue tint", "make {o} blue", "make {o} bluish", "make {o} more blue",
        "apply a blue filter", "blue filter", "color {o} blue", "turn {o} blue", "give {o} a blue tint", "put a blue filter on {o}",
        "wash {o} in blue", "blue overlay", "add a blue overlay to {o}", "paint {o} blue", "blue light",
        "give {o} a blue color cast", "blue", "tint with blue", "a blue toned version of {o}", "cover {o} with blue", "add blue to {o}",
    ),
    "blur": (
        "blur {o}", "blur", "make {o} blurry", "make {o} blurred", "add blur", "add a blur to {o}", "apply a blur", "gaussian blur",
        "apply a gaussian blur to {o}", "soften {o}", "make {o} soft", "out of focus", "put {o} out of focus", "make {o} out of focus",
        "defocus {o}", "smooth {o}", "make {o} fuzzy", "soft focus", "a blurred version of {o}", "blur everything",
        "make {o} unsharp", "remove the sharp details", "blurry", "turn {o} blurry", "smooth out the details of {o}",
    ),
    "pixelate": (
        "pixelate {o}", "pixelate", "make {o} pixelated", "pixel art", "turn {o} into pixels", "turn {o} into pixel art",
        "make {o} blocky", "add a mosaic", "apply a mosaic effect to {o}", "mosaic", "make {o} a mosaic", "big pixels",
        "show {o} as big pixels", "pixelated version of {o}", "blocky pixels", "make {o} look like an 8-bit game", "8-bit",
        "8-bit style", "apply a pixelate effect", "use large pixels", "turn {o} into a mosaic", "make {o} from large blocks",
        "low resolution pixels", "convert {o} to blocks", "pixel blocks",
    ),
}  # fmt: skip

HELD_OUT: dict[str, tuple[str, ...]] = {
    "keep": ("leave the photo exactly as it is", "don't touch the image", "please keep everything unchanged",
             "return the original picture", "make no edit at all"),
    "grayscale": ("change the picture to black and white", "give me a grayscale version", "remove every color from the photo",
                  "could you make this a monochrome image", "turn everything grey"),
    "invert": ("give the image inverted colors", "create the negative of this photo", "reverse all the colours",
               "make the picture look like a film negative", "apply color inversion to the scene"),
    "night": ("make this a night picture", "turn the scene dark like midnight", "could you show the photo at nighttime",
              "change the picture to night time", "the scene at night, in moonlight"),
    "bright": ("give the photo a brighter exposure", "please lighten up the picture", "add brightness to the image",
               "the photo needs more light", "could you raise the brightness a lot"),
    "sepia": ("give the picture a sepia look", "an antique sepia photograph", "make the scene look like a vintage photo",
              "add sepia tones to the image", "apply an old photo effect"),
    "swap": ("switch blue with red", "please exchange the blue and red channels", "make blue red and red blue",
             "swap the colors red and blue", "interchange the red channel and the blue channel"),
    "warm": ("add warm light to the picture", "make the colors of the photo warmer", "warmer tones please",
             "give the scene a golden warm glow", "apply warm sunset colors"),
    "cool": ("make the colors of the photo cooler", "give the scene cold winter light", "cooler tones please",
             "apply cool icy colors", "a colder look for the picture"),
    "contrast": ("make the contrast of the photo stronger", "boost contrast a lot", "give the picture high contrast",
                 "the image needs more contrast", "please enhance contrast"),
    "red": ("put a red tint over the photo", "make the whole picture look red", "use a red filter",
            "color everything in red", "a red color wash"),
    "green": ("put a green tint over the photo", "make the whole picture look green", "use a green filter",
              "color everything in green", "a green color wash"),
    "blue": ("put a blue tint over the photo", "make the whole picture look blue", "use a blue filter",
             "color everything in blue", "a blue color wash"),
    "blur": ("give the photo a gaussian blur", "make everything look blurry", "apply soft focus to the picture",
             "could you blur the whole scene", "the image should be out of focus"),
    "pixelate": ("give the photo a pixelated look", "make the picture from big pixels", "turn the scene into blocky pixels",
                 "apply an 8-bit mosaic style", "could you pixelate everything"),
}  # fmt: skip

CANONICAL: dict[str, str] = {
    "keep": "keep it as it is", "grayscale": "make it grayscale", "invert": "invert the colors", "night": "make it night",
    "bright": "make it brighter", "sepia": "make it sepia", "swap": "swap red and blue", "warm": "make it warmer",
    "cool": "make it cooler", "contrast": "increase the contrast", "red": "tint it red", "green": "tint it green",
    "blue": "tint it blue", "blur": "blur it", "pixelate": "pixelate it",
}  # fmt: skip


NAMES = tuple(TRAIN)


def plain(text: str) -> str:
    """Letters, digits and single spaces only: two wordings with the same plain form count as the same."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


_HELD = {plain(text) for texts in HELD_OUT.values() for text in texts}


def dress(phrase: str, rng: random.Random) -> str:
    """One way to say a phrase: an object, a dressing, an ending and a case."""
    while True:
        text = phrase.format(o=rng.choice(OBJECTS))
        text = rng.choice(DRESSINGS).format(text) + rng.choice(ENDINGS)
        if plain(text) not in _HELD:
            break
    case = rng.random()
    if case < 0.4:
        return text[0].upper() + text[1:]
    if case < 0.5:
        return text.upper()
    return text.title() if case < 0.53 else text


def sample(edit: str, rng: random.Random) -> str:
    """A training wording of an edit."""
    return dress(rng.choice(TRAIN[edit]), rng)
