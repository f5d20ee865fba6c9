"""Time and traffic of a plan, by hand: what is sent, how long a step and the run take, which stage is recommended.

Seen to fail with: crossings of the network between nodes counted by rank; all of ZeRO 2's communication overlapped, or
none; weights halved with the gradients; a recommendation by what is hidden at best; GPU-hours of one GPU; a collective
left out of the printed sum; ZeRO 3's gathers counted once.
"""

import re
from dataclasses import replace
from math import prod

import pytest
from estimates import printed_estimate

from sgtm.config import load_config
from sgtm.estimate.shapes import model_flops
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import estimate, recommended
from sgtm.estimate.traffic import ALL_GATHER, ALL_REDUCE, REDUCE, REDUCE_SCATTER, collectives, ring_bytes


def test_ring_bytes():
    assert (ring_bytes(ALL_REDUCE, 400, 4), ring_bytes(ALL_GATHER, 400, 4)) == (600, 300)
    assert (
        ring_bytes(REDUCE_SCATTER, 400, 4) == ring_bytes(REDUCE, 400, 4) == 300 and ring_bytes(ALL_REDUCE, 400, 1) == 0
    )


def test_one_rank_moves_nothing():
    assert all(collectives(load_config("debug"), stage, 1) == [] for stage in range(4))


def test_speed_by_hand():
    """Two nodes of two: every rank sends, half of them to the other node; the slower network sets the pace."""
    config = load_config("debug", ["--train.micro_batch=1", "--train.precision=fp32"])
    machine = Machine(nodes=2, gpus=2, tflops=1e-6, inside=1e-3, between=1e-4, reached=0.5, sustained=0.8)
    plain, *_, last = estimate(config, machine)
    sent = 2 * 4 * 35_392 * 3 / 4
    assert (plain.speed.inside, plain.speed.between) == (sent / 2, sent)
    assert plain.speed.communication == pytest.approx(sent / (1e5 * 0.8))
    assert plain.speed.compute == pytest.approx(model_flops(config.model) * 512 / (4e6 * 0.5))
    for row in (plain, last):
        assert row.speed.step == row.speed.compute + row.speed.communication
        assert row.speed.tokens_per_second == pytest.approx(512 / row.speed.step)
    assert plain.speed.best_step == pytest.approx(plain.speed.step)
    assert last.speed.best_step == pytest.approx(max(last.speed.compute, last.speed.communication))
    assert plain.speed.utilisation == pytest.approx(0.5 * plain.speed.compute / plain.speed.step)
    one_node, *_ = estimate(config, Machine(nodes=1, gpus=4))
    assert (one_node.speed.inside, one_node.speed.between) == (sent, 0)


@pytest.mark.parametrize("tflops", [1e-7, 10.0])
def test_zero_2_hides_the_reduction_of_gradients_alone_at_best(tflops):
    """Behind the computation, or the computation behind it; the weights are gathered after the optimizer."""
    config = load_config("debug", ["--train.micro_batch=1"])
    two = estimate(config, Machine(gpus=4, tflops=tflops, inside=1e-3, sustained=1.0))[2]
    reduction, gathering = (collective.sent(4) / 1e6 for collective in two.moved)
    assert two.speed.communication == pytest.approx(reduction + gathering)
    assert (two.speed.compute > reduction) == (tflops < 1)
    assert two.speed.best_step == pytest.approx(max(two.speed.compute, reduction) + gathering)


def test_the_run_in_days_and_gpu_hours():
    config = load_config("debug", ["--train.micro_batch=1", "--train.steps=1000"])
    for row in estimate(config, Machine(nodes=2, gpus=2, tflops=1e-3, inside=1e-2)):
        for found, step in ((row.whole, row.speed.step), (row.best, row.speed.best_step)):
            assert found.days * 86_400 == pytest.approx(1000 * step)
            assert found.gpu_hours * 3600 == pytest.approx(4 * 1000 * step)
        assert row.best.days <= row.whole.days


@pytest.mark.parametrize("machine", [Machine(gpus=8), Machine(64, 8, between=20.0), Machine(64, 8, tflops=100.0)])
def test_the_stage_that_is_recommended_is_the_fastest_under_one_assumption(machine):
    """Were it `best_step`, ZeRO 3 would be it wherever the computation is long enough."""
    config = load_config("llama-1b", ["--train.tokens_per_step=2097152"])
    rows = estimate(config, machine)
    choice = recommended(rows, machine)
    assert choice.stage == 1 and choice.speed.step == min(row.speed.step for row in rows)
    assert min(rows, key=lambda row: row.speed.best_step).stage == 3
    small = replace(machine, memory=(rows[2].memory.peak + 1) / 1e9)
    assert recommended(rows, small) == min(rows[2:], key=lambda row: row.speed.step)
    assert recommended(rows, replace(machine, memory=1.0)) is None


@pytest.mark.parametrize(
    ("machine", "options", "line"),
    [
        (Machine(gpus=8), (), "Recommended: ZeRO 1 (--distributed.zero_stage 1): of the stages that fit"),
        (Machine(gpus=8), ("--distributed.zero_stage=1",), "Recommended: ZeRO 1 (the config has it): of the stages"),
        (Machine(64, 8), ("--train.tokens_per_step=2097152",), "ZeRO 2 or 3 would be faster only with what it sends "),
        (Machine(), (), "Recommended: ZeRO 1 (--distributed.zero_stage 1): one rank sends nothing"),
        (Machine(memory=5.0), (), "Recommended: no stage as it is. distributed.zero_stage 2 with train.micro_batch"),
    ],
)  # fmt: skip
def test_the_recommendation_in_words(machine, options, line):
    assert line in printed_estimate(load_config("llama-1b", list(options)), machine, width=400)


@pytest.mark.parametrize(
    ("name", "machine", "options"),
    [
        ("llama-7b", Machine(64, 8), ()),
        ("llama-7b", Machine(64, 3), ("--train.tokens_per_step=3145728", "--model.activation_checkpointing=false")),
        ("debug", Machine(gpus=2), ()),
        ("gpt2-124m", Machine(gpus=8), ("--train.precision=fp32",)),
    ],
)
def test_what_is_sent_can_be_summed_by_hand(name, machine, options):
    """The printed products add up to the printed bytes, and the weights of ZeRO 3 to their gathers."""
    config, ranks = load_config(name, list(options)), machine.ranks
    text, rows = printed_estimate(config, machine, width=400), estimate(config, machine)
    assert f"x {ranks - 1}/{ranks}" in text
    sums, stage = {}, None
    for line in text.splitlines():
        found = re.match(r"\s*([\d, ]*?)\s*([\d,]+) x (\d+) x (\d+) x (\d+) +[\d.]+ ", line)
        if found:
            stage = found[1] or stage
            numbers = [int(number.replace(",", "")) for number in found.groups()[1:]]
            sums[stage] = sums.get(stage, 0) + prod(numbers) * (ranks - 1) / ranks
    sums |= dict.fromkeys("01", sums["0, 1"]) if "0, 1" in sums else {}
    for row in rows:
        assert sums[str(row.stage)] == pytest.approx(sum(c.sent(ranks) for c in row.moved), rel=1e-12)
    total = rows[3].moved[1].elements
    if told := re.search(r"in a micro-batch: ([\d, x+]+) = ([\d,]+) elements(, before each is padded)?", text):
        products = [map(int, product.replace(",", "").split(" x ")) for product in told[1].split(" + ")]
        elements = int(told[2].replace(",", ""))
        assert sum(map(prod, products)) == elements
        assert elements == total if not told[3] else elements < total < elements + 2 * ranks * 200
    else:
        assert total == 0


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
