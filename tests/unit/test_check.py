"""sgtm/audit/check.py: how two mappings differ, key by key."""

from sgtm.audit.check import Check, differing


def test_each_difference_is_a_line_with_its_path():
    expected = {"a": 1, "b": {"c": 2, "d": [3]}, "e": None}
    assert differing("file", dict(expected), expected) == []
    actual = {"a": 1, "b": {"c": 5, "f": True}, "g": "x" * 200}
    assert differing("file", actual, expected) == [
        "file: b: c is 5, should be 2",
        "file: b: d is missing",
        "file: b: f should not be there: True",
        "file: e is missing",
        f"file: g should not be there: '{'x' * 76}...",
    ]


def test_a_mapping_in_the_place_of_a_value_is_a_difference():
    assert differing("f", {"a": {}}, {"a": 1}) == ["f: a is {}, should be 1"]


def test_an_outcome_is_a_word():
    check = Check("name", "about")
    assert check.passed and check.outcome == "passed"
    check.skipped = "why"
    assert check.passed and check.outcome == "skipped"
    check.problems.append("what")
    assert not check.passed and check.outcome == "FAILED"
