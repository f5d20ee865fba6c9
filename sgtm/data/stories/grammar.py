"""The engine that tells stories: templates, a cast bound for the length of a story, and words that inflect.

A template is a Python format string. `{hero}` is whoever the story is about; a name that is not bound draws a fresh
word or phrase from the language's lists each time it is used. What stands after the colon inflects: `{hero:he|she}`
chooses by gender, `{thing:a}` puts the article, and `{adjective:{thing:m|f}}` makes an adjective agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Dice:
    """Random choices from a seeded generator, drawn in bulk: one at a time numpy's would cost more than the story."""

    def __init__(self, *seed: int):
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._drawn: list[float] = []

    def draw(self) -> float:
        if not self._drawn:
            self._drawn = self._generator.random(256).tolist()
        return self._drawn.pop()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.draw() * len(options))]

    def distinct(self, options: Sequence[T], count: int) -> list[T]:
        chosen: list[T] = []
        while len(chosen) < count:
            option = self.pick(options)
            if option not in chosen:
                chosen.append(option)
        return chosen


@dataclass(frozen=True)
class Word:
    """A word with its gender ("m", "f") and, where irregular, its plural. Languages derive their own, with articles."""

    text: str
    gender: str = "m"
    plural: str = ""

    def __format__(self, spec: str) -> str:
        if "|" in spec:
            masculine, feminine = spec.split("|")
            return feminine if self.gender == "f" else masculine
        return self.inflect(spec) if spec else self.text

    def inflect(self, spec: str) -> str:
        raise ValueError(f"{self.text!r} has no form {spec!r}")


@dataclass(frozen=True)
class Language:
    """words: lists to draw from; cast: which list each bound name is drawn from; plots: scenes in order."""

    words: dict[str, list]
    cast: dict[str, str]
    scenes: dict[str, list[str]]
    plots: list[list[str]]


@dataclass
class Teller(dict):
    """The name space of one story's templates: the cast, and fresh draws for every other name."""

    language: Language
    dice: Dice
    cast: dict = field(init=False)

    def __post_init__(self):
        by_list: dict[str, list[str]] = {}
        for name, words in self.language.cast.items():
            by_list.setdefault(words, []).append(name)
        for words, names in by_list.items():
            self.update(zip(names, self.dice.distinct(self.language.words[words], len(names)), strict=True))

    def __missing__(self, name: str):
        word = self.dice.pick(self.language.words[name])
        return word.format_map(self) if isinstance(word, str) and "{" in word else word

    def tell(self) -> str:
        """A story: the scenes of a plot, each in one of its wordings, in paragraphs."""
        paragraphs: list[str] = []
        used: set[str] = set()
        for number, scene in enumerate(self.dice.pick(self.language.plots)):
            template = self.dice.pick([wording for wording in self.language.scenes[scene] if wording not in used])
            used.add(template)
            text = _capitalised(template.format_map(self))
            if number and self.dice.draw() < 0.6 and not text.startswith("—"):
                paragraphs[-1] += " " + text
            else:
                paragraphs.append(text)
        return "\n".join(paragraphs)


def _capitalised(text: str) -> str:
    """Every sentence begins with a capital, whatever was drawn for its first word."""
    characters, begin = list(text), True
    for i, character in enumerate(characters):
        if begin and character.isalpha():
            characters[i], begin = character.upper(), False
        elif character in ".!?" and text[i + 1 : i + 2] == " ":
            begin = text[i + 2 : i + 3] != "—"  # in Spanish a dash after speech goes on with "—preguntó ella"
    return "".join(characters)
