"""Cutting fragments at the rows of the keys, and refusing a layout that is not a partition."""

from __future__ import annotations

import pytest
import torch

from sgtm.distributed.optim import Segment
from sgtm.distributed.segments import Fragment, check_cover, segment_tables
from sgtm.model.rows import group_rows, joint_rows

ROWS = {"w": group_rows("mlp_in", ("retain", "es"), (0, 5, 7)), "norm": joint_rows("norm", 4)}
NUMELS = {"w": 21, "norm": 4}


def unsummed(counts: torch.Tensor) -> torch.Tensor:
    return counts


def test_fragments_are_cut_at_the_rows_of_the_keys():
    """Two ranks' partitions of 14 elements, the second padded; the border falls inside row 4 of `w`."""
    first, second = torch.zeros(14), torch.zeros(14)
    pieces = [
        Fragment(first, 0, "w", 0, 14),
        Fragment(second, 7, "norm", 0, 4),
        Fragment(second, 0, "w", 14, 21),
    ]
    tables = segment_tables(pieces, NUMELS, ROWS)
    assert tables == {
        first: [Segment(0, 14, "mlp_in.retain", True)],
        second: [
            Segment(0, 1, "mlp_in.retain", True),
            Segment(1, 7, "mlp_in.es", True),
            Segment(7, 11, "norm", False),
        ],
    }
    check_cover(pieces, NUMELS, 1, unsummed)


def test_row_layout_must_fit_the_parameters():
    with pytest.raises(ValueError, match=r"differ in \['norm'\]"):
        segment_tables([], {"w": 21}, ROWS)
    with pytest.raises(ValueError, match=r"do not cover parameter 'w' of 22 elements"):
        segment_tables([Fragment(torch.zeros(22), 0, "w", 0, 22)], {"w": 22, "norm": 4}, ROWS)


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, "w", 0, 20), (21, "norm", 0, 4)],  # an element of w is missing
        [(0, "w", 0, 21), (21, "norm", 0, 4), (25, "norm", 0, 1)],  # one of norm is there twice
        [(0, "w", 0, 21), (20, "norm", 0, 4)],  # two parameters in one place
        [(0, "w", 0, 21), (28, "norm", 0, 4)],  # beyond the end
    ],
)
def test_what_is_no_partition_is_refused(pieces):
    flat = torch.zeros(30)
    with pytest.raises(RuntimeError, match="DeepSpeed's partitions"):
        check_cover([Fragment(flat, *piece) for piece in pieces], NUMELS, 1, unsummed)
