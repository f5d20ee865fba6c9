"""English and Spanish: how words inflect, and that every template of their files can be told."""

import pytest

from sgtm.data.stories.grammar import Dice, Teller
from sgtm.data.stories.languages import EnglishNoun, SpanishNoun, SpanishPair, language


@pytest.mark.parametrize("code", ["en", "es"])
def test_every_template_can_be_told(code):
    stories = language(code)
    teller = Teller(stories, Dice(0))
    assert {scene for plot in stories.plots for scene in plot} == set(stories.scenes)
    for template in [wording for wordings in stories.scenes.values() for wording in wordings]:
        for _ in range(5):
            assert not set("{}|") & set(template.format_map(teller)), template


def test_english_nouns():
    nouns = [(("owl",), "a"), (("fox",), "a"), (("lamp",), "s"), (("fox", "m", "foxes"), "s"), (("wool",), "")]
    forms = [f"{EnglishNoun(*noun):{form}}" for noun, form in nouns]
    assert forms == ["an owl", "a fox", "lamps", "foxes", "wool"]
    with pytest.raises(ValueError, match="'owl' has no form 'el'"):
        format(EnglishNoun("owl"), "el")


def test_spanish_nouns():
    forms = [f"{SpanishNoun(*noun):{form}}" for noun, form in
             [(("llave", "f"), "el"), (("molino", "m"), "al"), (("torre", "f"), "del"), (("bastón", "m"), "s"),
              (("lápiz", "m"), "los"), (("canal", "m"), "un"), (("paraguas", "m", "paraguas"), "los")]]  # fmt: skip
    assert forms == ["la llave", "al molino", "de la torre", "bastones", "los lápices", "un canal", "los paraguas"]
    with pytest.raises(ValueError, match="'torre' has no form 'x'"):
        format(SpanishNoun("torre", "f"), "x")


def test_spanish_adjectives_and_trades():
    pairs = [(("rojo",), "m"), (("rojo",), "f"), (("verde",), "f"), (("pastor", "m", "pastora"), "f")]
    forms = [f"{SpanishPair(*pair):{form}}" for pair, form in pairs]
    assert forms == ["rojo", "roja", "verde", "pastora"]


def test_a_word_has_the_gender_and_other_form_of_its_list():
    words = [word for words in language("es").words.values() for word in words if isinstance(word, SpanishNoun)]
    assert {word.gender for word in words} == {"m", "f"} and any(word.plural for word in words)
    assert not any("/" in word.text or "," in word.text for word in words)
