"""The engine that tells stories: dice, words that inflect, a cast bound for the length of a story."""

from collections import Counter

import pytest

from sgtm.data.stories.grammar import Dice, Language, Teller, Word

NAMES = ["Ana", "Bo", "Cy"]


def tell(scenes: dict[str, list[str]], plot: list[str], seed: int = 0, **words) -> str:
    cast = {"hero": "name", "friend": "name"} if "name" in words else {}
    return Teller(Language(words, cast, scenes, [plot]), Dice(seed)).tell()


def test_draws_follow_the_seed_alone():
    one, again, other = ([dice.draw() for _ in range(600)] for dice in (Dice(3, 1), Dice(3, 1), Dice(3, 2)))
    assert one == again != other and len(set(one)) == 600
    assert all(0 <= draw < 1 for draw in one)


def test_every_option_is_picked_alike():
    dice = Dice(0)
    counts = Counter(dice.pick("abc") for _ in range(3000))
    assert counts.keys() == set("abc") and all(counts[option] == pytest.approx(1000, abs=100) for option in "abc")


def test_distinct_options_are_all_others():
    for seed in range(20):
        assert sorted(Dice(seed).distinct(NAMES, 3)) == NAMES
    assert len({tuple(Dice(seed).distinct(NAMES, 2)) for seed in range(50)}) == 6


def test_a_word_chooses_by_gender_and_has_no_other_forms():
    assert [f"{word:he|she}" for word in (Word("Bo"), Word("Ana", "f"))] == ["he", "she"]
    assert f"{Word('Bo')}" == "Bo"
    with pytest.raises(ValueError, match="'Bo' has no form 's'"):
        format(Word("Bo"), "s")


def test_the_cast_stays_and_other_names_are_drawn_anew():
    drawn = set()
    for seed in range(20):
        text = tell({"only": ["{hero} {hero} {friend} {name} {name}"]}, ["only"], seed, name=NAMES)
        hero, same, friend, *others = text.split()
        assert hero == same != friend
        drawn.add(tuple(others))
    assert len(drawn) > 5


def test_a_phrase_may_have_names_in_it():
    assert tell({"only": ["{place}."]}, ["only"], place=["by the {thing}"], thing=["mill"]) == "By the mill."


def test_sentences_begin_with_a_capital_but_not_what_follows_a_dash():
    """In Spanish the speaker is named after a dash, in lower case."""
    wording = '{animal} ran. "{animal}, no!" it said. —{animal}? —asked it. 3 {animal}.'
    assert tell({"only": [wording]}, ["only"], animal=["ox"]) == 'Ox ran. "Ox, no!" it said. —ox? —asked it. 3 Ox.'


def test_no_wording_is_told_twice_in_a_story():
    scenes = {"walk": ["one.", "two.", "three."]}
    for seed in range(20):
        assert sorted(tell(scenes, ["walk"] * 3, seed).split()) == ["One.", "Three.", "Two."]


def test_a_scene_joins_the_paragraph_before_it_but_speech_never_does():
    breaks = Counter(tell({"a": ["a."], "b": ["b."]}, ["a", "b"], seed) for seed in range(500))
    assert breaks.keys() == {"A. B.", "A.\nB."} and breaks["A. B."] == pytest.approx(300, abs=50)
    assert {tell({"a": ["a."], "b": ["—b."]}, ["a", "b"], seed) for seed in range(20)} == {"A.\n—B."}
