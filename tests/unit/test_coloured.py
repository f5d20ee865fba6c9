"""Tokens are coloured by what removal does to their loss."""

from sgtm.report.coloured import Token, coloured, coloured_passage

PASSAGE = {
    "category": "es",
    "tokens": ["a", "b", "c", "d", "e"],
    "losses": {"full": [None, 1.0, 2.0, 3.0, 5.0], "without es": [None, 9.0, 1.0, 3.0, 5.02]},
}


def test_a_token_has_the_direction_and_the_shade_of_its_difference():
    (shown,) = coloured({"passages": [PASSAGE]})
    assert (shown.category, shown.condition) == ("es", "without es")
    assert shown.tokens == [
        Token("a", "", 0, ""),
        Token("b", "up", 100, "1.00 full, 9.00 without es"),
        Token("c", "down", 25, "2.00 full, 1.00 without es"),
        Token("d", "", 0, "3.00 full, 3.00 without es"),
        Token("e", "up", 0, "5.00 full, 5.02 without es"),
    ]
    assert coloured({"losses": {}}) == []


def test_a_passage_of_one_model_has_its_losses_and_no_colour():
    shown = coloured_passage({"category": "text", "tokens": ["a", "b"], "losses": {"full": [None, 1.0]}})
    assert shown.tokens == [Token("a", "", 0, ""), Token("b", "", 0, "1.00 full")]


def test_any_two_models_are_compared_in_their_order():
    losses = {"runs/b": [1.0], "runs/a": [2.0]}
    shown = coloured_passage({"category": "text", "tokens": ["a"], "losses": losses})
    assert (shown.base, shown.condition) == ("runs/b", "runs/a")
    assert shown.tokens == [Token("a", "up", 25, "1.00 runs/b, 2.00 runs/a")]
