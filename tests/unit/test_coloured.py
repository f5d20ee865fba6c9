"""Tokens are coloured by what removal does to their loss."""

from sgtm.report.coloured import Token, coloured

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
