"""Collectives of a step and the bytes that they send; tests/dist/test_estimate.py counts them in runs."""

from sgtm.config import load_config
from sgtm.estimate.traffic import ALL_GATHER, ALL_REDUCE, REDUCE, REDUCE_SCATTER, collectives, ring_bytes


def test_ring_bytes():
    assert (ring_bytes(ALL_REDUCE, 400, 4), ring_bytes(ALL_GATHER, 400, 4)) == (600, 300)
    assert (
        ring_bytes(REDUCE_SCATTER, 400, 4) == ring_bytes(REDUCE, 400, 4) == 300 and ring_bytes(ALL_REDUCE, 400, 1) == 0
    )


def test_one_rank_moves_nothing():
    assert all(collectives(load_config("debug"), stage, 1) == [] for stage in range(4))


def test_communication_in_bf16_halves_the_bytes_of_gradients():
    for stage in range(4):
        full, half = (
            collectives(
                load_config("debug", [f"--distributed.communication={kind}", "--train.micro_batch=1"]), stage, 4
            )
            for kind in ("fp32", "bf16")
        )
        for one, other in zip(full, half, strict=True):
            assert one.sent(4) == other.sent(4) * (2 if one.what == "gradients" else 1)
