"""Labels and groups of a list of domains."""

import pytest

from sgtm.masking.labels import (
    FIRST_FORGET,
    RETAIN,
    UNLABELED,
    LabelSpace,
    lowered_domains,
    removed_domains,
    strength_name,
)

SPACE = LabelSpace(("bio", "cyber", "nuclear"))


def test_names_and_indices():
    assert SPACE.labels == ("unlabeled", "retain", "forget:bio", "forget:cyber", "forget:nuclear")
    assert SPACE.groups == ("retain", "bio", "cyber", "nuclear")
    assert (SPACE.label("unlabeled"), SPACE.label("retain")) == (UNLABELED, RETAIN)
    assert [SPACE.label(f"forget:{d}") for d in SPACE.domains] == [FIRST_FORGET, FIRST_FORGET + 1, FIRST_FORGET + 2]
    assert [SPACE.group_of(d) for d in SPACE.domains] == [1, 2, 3]


def test_no_domains():
    assert LabelSpace(()).labels == ("unlabeled", "retain")
    assert LabelSpace(()).groups == ("retain",)
    assert LabelSpace(()).removals() == [()]


def test_removals_are_none_each_and_all():
    each = [("bio",), ("cyber",), ("nuclear",)]
    assert SPACE.removals() == [(), *each, SPACE.domains]
    assert LabelSpace(("a", "b")).removals() == [(), ("a",), ("b",), ("a", "b")]
    assert LabelSpace(("a",)).removals() == [(), ("a",)]


def test_chosen_removals_are_added_once_in_the_order_of_the_domains():
    chosen = [["nuclear", "bio"], ["bio", "nuclear", "bio"], ["cyber"], [], ["bio", "cyber"]]
    each = [("bio",), ("cyber",), ("nuclear",)]
    assert SPACE.removals(chosen) == [(), *each, ("bio", "cyber"), ("bio", "nuclear"), SPACE.domains]
    with pytest.raises(ValueError, match="unknown domain 'chem'"):
        SPACE.removals([["bio", "chem"]])


@pytest.mark.parametrize("count", [3, 20, 50])
def test_the_number_of_removals_is_linear_in_the_domains(count):
    space = LabelSpace(tuple(f"d{i}" for i in range(count)))
    assert len(space.removals()) == count + 2 and len(space.removals([["d0", "d1"]])) == count + 3


def test_names_list_their_domains():
    assert removed_domains("without bio,cyber") == lowered_domains("without bio,cyber") == ("bio", "cyber")
    name = strength_name({"look at me": 0.5, "bio": 0.0})
    assert name == "with look at me at 0.5,bio at 0"
    assert (removed_domains(name), lowered_domains(name)) == ((), ("look at me", "bio"))
    assert removed_domains("full") == lowered_domains("full") == ()


@pytest.mark.parametrize(
    "domains", [("a", "a"), ("",), ("retain",), ("unlabeled",), ("full",), ("forget:a",), ("a,b",), ("ok", "a", "ok")]
)
def test_bad_domains(domains):
    with pytest.raises(ValueError, match="domains must be distinct names") as error:
        LabelSpace(domains)
    assert str(list(domains)) in str(error.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown label 'forget:boi'.*forget:bio"):
        SPACE.label("forget:boi")
    with pytest.raises(ValueError, match=r"unknown domain 'retain'.*bio, cyber"):
        SPACE.group_of("retain")
