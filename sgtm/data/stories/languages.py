"""English and Spanish: how words inflect, and the lists and templates in the YAML files beside this one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from sgtm.data.stories.grammar import Language, Word


class EnglishNoun(Word):
    """Forms: `a` with the indefinite article, `s` the plural. Adjectives need the article too."""

    def inflect(self, spec: str) -> str:
        if spec == "a":
            return ("an " if self.text[0] in "aeiou" else "a ") + self.text
        return (self.plural or self.text + "s") if spec == "s" else super().inflect(spec)


class SpanishNoun(Word):
    """Forms: `el`, `un` with the article, `al`, `del` contracted, `s` the plural, `los` the plural with its article."""

    def inflect(self, spec: str) -> str:
        articles = {"el": "el|la", "un": "un|una", "al": "al|a la", "del": "del|de la"}
        if spec in articles:
            return f"{self:{articles[spec]}} {self.text}"
        if spec == "los":
            return f"{self:los|las} {self:s}"
        return self._plural() if spec == "s" else super().inflect(spec)

    def _plural(self) -> str:
        if self.plural:
            return self.plural
        for ending, plural in (("z", "ces"), ("ón", "ones"), ("ín", "ines")):
            if self.text.endswith(ending):
                return self.text.removesuffix(ending) + plural
        return self.text + ("s" if self.text[-1] in "aeiouáéó" else "es")


class SpanishPair(Word):
    """An adjective or trade. Forms: `m`, `f`; the feminine is kept where a noun keeps its plural."""

    def inflect(self, spec: str) -> str:
        feminine = self.plural or (self.text[:-1] + "a" if self.text.endswith("o") else self.text)
        return feminine if spec == "f" else self.text


@cache
def language(code: str) -> Language:
    """`en` or `es`, read from its file."""
    name, noun = {"en": ("english", EnglishNoun), "es": ("spanish", SpanishNoun)}[code]
    content = yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))
    words: dict[str, list] = {key: _items(text) for key, text in content["phrases"].items()}
    for section, word_type in (("names", Word), ("nouns", noun), ("pairs", SpanishPair)):
        for key, lists in content.get(section, {}).items():
            by_gender = lists if isinstance(lists, dict) else {"m": lists}
            words[key] = [_word(word_type, item, gender) for gender, text in by_gender.items() for item in _items(text)]
    cast = {who: key for key, names in content["cast"].items() for who in _items(names)}
    return Language(words, cast, content["scenes"], [plot.split() for plot in content["plots"]])


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _word(word_type: type[Word], item: str, gender: str) -> Word:
    text, _, other_form = item.partition("/")
    return word_type(text, gender, other_form)
