"""Bytes as they are printed."""

import pytest

from sgtm.estimate.units import GB, MB, amount, unit


@pytest.mark.parametrize(
    ("size", "expected"), [(3.24e9, "3.2 GB"), (1e9, "1.0 GB"), (999e6, "999.0 MB"), (5e5, "0.5 MB")]
)
def test_bytes_have_the_unit_that_suits_them(size, expected):
    assert amount(size) == expected
    assert unit(size) == (("GB", GB) if "GB" in expected else ("MB", MB))
