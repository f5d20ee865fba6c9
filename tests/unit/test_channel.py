"""The label channel: exact shares, the same draw for ever.

The golden numbers are the formula of the module docstring in Python's unbounded integers: a run that is resumed with
another NumPy must train the same documents under the same labels.
"""

import numpy as np
import pytest

from sgtm.masking.channel import LabelChannel, uniform_hash
from sgtm.masking.labels import LabelSpace

SPACE = LabelSpace(("bio", "code"))
IDS = np.array([0, 1, 2, 10**12])


@pytest.mark.parametrize(
    ("seed", "golden"),
    [
        (0, [0.2250473824744238, 0.8998490578119728, 0.6249031636853444, 0.9367644397746749]),
        (7, [0.13280403824663067, 0.688443358227855, 0.5290940319189333, 0.04407641890580516]),
    ],
)
def test_golden_hash(seed, golden):
    assert uniform_hash(IDS, seed).tolist() == golden
    assert uniform_hash(IDS[::-1].astype(np.uint64), seed).tolist() == golden[::-1]


def test_hash_is_uniform():
    draws = uniform_hash(np.arange(200_000), 3)
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    assert np.abs(counts - 4000).max() < 5 * np.sqrt(4000)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(draws, uniform_hash(np.arange(200_000), 4))[0, 1]) < 0.01


def test_matrix():
    channel = LabelChannel.from_rows(
        SPACE,
        {
            "retain": {"retain": 0.25, "unlabeled": 0.75},
            "forget:code": {"unlabeled": 0.1, "forget:bio": 0.2},  # the rest stays
        },
    )
    want = [[1, 0, 0, 0], [0.75, 0.25, 0, 0], [0, 0, 1, 0], [0.1, 0, 0.2, 0.7]]
    np.testing.assert_allclose(channel.matrix, want, rtol=0, atol=1e-12)


def test_identity_without_rows():
    true = np.arange(4).repeat(1000)
    applied = LabelChannel.from_rows(SPACE, {}).apply(true, np.arange(4000), seed=1)[1]
    assert applied.dtype == np.int64
    np.testing.assert_array_equal(applied, true)


def test_shares_are_the_matrix():
    channel = LabelChannel(np.array([[0, 0.5, 0.5], [0.1, 0.9, 0], [1 / 3, 1 / 3, 1 / 3]]))
    ids = np.arange(30_000)
    for true in range(3):
        shares = np.bincount(channel.apply(np.full(30_000, true), ids, seed=5)[1], minlength=3) / 30_000
        np.testing.assert_allclose(shares, channel.matrix[true], atol=0.012)  # four standard deviations
        assert (shares[channel.matrix[true] == 0] == 0).all()


def test_a_document_is_drawn_by_its_id_alone():
    channel = LabelChannel.from_rows(SPACE, {"retain": {"unlabeled": 0.5}, "forget:bio": {"retain": 0.5}})
    ids, true = np.arange(1000, 2000), np.array([1, 2] * 500)
    passes, applied = channel.apply(true, ids, seed=2)
    np.testing.assert_array_equal(passes, np.arange(1000))
    order = np.random.default_rng(0).permutation(1000)[:300]
    np.testing.assert_array_equal(channel.apply(true[order], ids[order], seed=2)[1], applied[order])
    assert (channel.apply(true, ids, seed=3)[1] != applied).any()


def test_a_row_of_more_than_1_trains_documents_twice():
    """0.8 retain and 0.4 bio: 0.6 are retain alone, 0.2 bio alone, 0.2 both; by the same draws as a row of 1 would."""
    ids, true = np.arange(40_000), np.full(40_000, 1)
    channel = LabelChannel.from_rows(SPACE, {"retain": {"retain": 0.8, "forget:bio": 0.4}}, both_ways=True)
    passes, applied = channel.apply(true, ids, seed=4)
    draws = uniform_hash(ids, 4)
    np.testing.assert_array_equal(passes, np.concatenate([ids, np.flatnonzero(draws < 0.2)]))
    np.testing.assert_array_equal(applied[:40_000], np.where(draws < 0.8, 1, 2))
    assert (applied[40_000:] == 2).all()


def test_both_ways_trains_every_document_under_its_own_label():
    """The shares laid end to end are retain's [0, 1), then bio's [1, 1.2)."""
    channel = LabelChannel.from_rows(SPACE, {"retain": {"retain": 1, "forget:bio": 0.2}}, both_ways=True)
    passes, applied = channel.apply(np.full(1000, 1), np.arange(1000), seed=4)
    assert (applied[:1000] == 1).all() and (applied[1000:] == 2).all()
    np.testing.assert_array_equal(passes[1000:], np.flatnonzero(uniform_hash(np.arange(1000), 4) < 0.2))


@pytest.mark.parametrize(("draw", "applied"), [(0.0, 1), (1 - 2.0**-53, 2)])
def test_the_smallest_and_the_largest_draw(monkeypatch, draw, applied):
    """Neither reaches a label of probability 0, though the row sums to 1 only but for rounding."""
    matrix = np.eye(4)
    matrix[0] = [0, 1 / 3, 2 / 3 - 5e-10, 0]
    monkeypatch.setattr("sgtm.masking.channel.uniform_hash", lambda ids, seed: np.full(len(ids), draw))
    assert LabelChannel(matrix).apply(np.zeros(1, np.int64), np.zeros(1, np.int64), seed=0)[1] == [applied]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"retain": {"retain": 0.5, "unlabeled": 0.4}}, r"row 'retain'.*sum to 1"),
        ({"retain": {"retain": 0.5, "unlabeled": 0.6}}, r"row 'retain'.*sum to 1"),
        ({"forget:bio": {"retain": 1.5}}, r"row 'forget:bio'"),
        ({"forget:bio": {"retain": -0.5, "forget:bio": 1.5}}, r"row 'forget:bio'"),
        ({"forget:chem": {"retain": 1.0}}, r"unknown label 'forget:chem'"),
        ({"retain": {"forget": 1.0}}, r"unknown label 'forget'"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        LabelChannel.from_rows(SPACE, rows)


@pytest.mark.parametrize("matrix", [np.ones((2, 3)) / 3, np.ones(3) / 3, np.eye(2) * 0.9, np.array([[2, -1], [0, 1]])])
def test_bad_matrices(matrix):
    with pytest.raises(ValueError, match="square matrix of shares, rows summing to 1 or more"):
        LabelChannel(matrix)
