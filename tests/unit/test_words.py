"""Plurals and lists in the sentences that programs print."""

import pytest

from sgtm.words import counted, listed


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("rank",), "0 ranks"),
        (1, ("rank",), "1 rank"),
        (2048, ("rank",), "2,048 ranks"),
        (1, ("entry is", "entries are"), "1 entry is"),
        (2, ("entry is", "entries are"), "2 entries are"),
    ],
)
def test_one_is_singular_and_all_else_plural(number, words, expected):
    assert counted(number, *words) == expected


def test_the_last_of_a_list_has_its_own_word():
    assert [listed(range(1, n + 1), "or") for n in (1, 2, 3)] == ["1", "1 or 2", "1, 2 or 3"]
    assert listed(["en", "es"]) == "en and es"
