"""Numbers as they are printed."""

import pytest

from sgtm.estimate.units import GB, MB, amount, counted, listed, unit


@pytest.mark.parametrize(
    ("size", "expected"), [(3.24e9, "3.2 GB"), (1e9, "1.0 GB"), (999e6, "999.0 MB"), (5e5, "0.5 MB")]
)
def test_bytes_have_the_unit_that_suits_them(size, expected):
    assert amount(size) == expected
    assert unit(size) == (("GB", GB) if "GB" in expected else ("MB", MB))


def test_one_is_singular_and_none_is_plural():
    assert [counted(number, "rank") for number in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]


def test_the_last_of_a_list_comes_after_or():
    assert [listed(values) for values in ([1], [1, 2], [1, 2, 4])] == ["1", "1 or 2", "1, 2 or 4"]
