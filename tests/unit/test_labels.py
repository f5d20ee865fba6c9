"""Labels and groups of a list of domains."""

import pytest

from sgtm.masking.labels import FIRST_FORGET, RETAIN, UNLABELED, LabelSpace

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
    assert LabelSpace(()).subsets() == [()]


def test_subsets():
    assert SPACE.subsets() == [
        (),
        ("bio",),
        ("cyber",),
        ("nuclear",),
        ("bio", "cyber"),
        ("bio", "nuclear"),
        ("cyber", "nuclear"),
        ("bio", "cyber", "nuclear"),
    ]


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
