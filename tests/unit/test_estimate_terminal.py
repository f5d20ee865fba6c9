"""The printed estimate: its units, its notes, the sums that a reader can check, and the recommendation in words."""

import io
import re
from math import prod

import pytest
from estimates import printed_estimate
from rich.console import Console

from sgtm.config import load_config
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import estimate
from sgtm.estimate.terminal import print_memory


def test_the_note_on_zero_1_is_where_a_step_has_several_micro_batches_and_it_fits():
    for micro_batch, memory_gb, expected in ((1, 80.0, 1), (2, 80.0, 0), (1, 1e-4, 0)):
        config = load_config("debug", [f"--train.micro_batch={micro_batch}"])
        text = printed_estimate(config, Machine(gpus=4, memory=memory_gb))
        assert text.count("in each of the 2 micro-batches of a step, ZeRO 0 and 1 once") == expected


HPZ = ("--distributed.zero_stage=3", "--distributed.zero_hpz_partition_size=4")


def test_the_note_on_hpz_traffic_is_where_hpz_is():
    for options, expected in ((HPZ, 1), (HPZ[:1], 0)):
        printed = printed_estimate(load_config("debug", list(options)), Machine(gpus=4))
        assert printed.count("what hpZ saves") == expected


def test_the_unit_is_that_of_the_largest_number():
    small = load_config("debug")
    rows = estimate(small, machine := Machine(gpus=4))
    text = printed_estimate(small, machine)
    assert "memory of a rank, MB, of 80.0 GB" in text and "MB sent" in text
    cells = [line.split() for line in text.splitlines() if line.split()[:1] == ["0"]]
    assert cells[0][-2:] == [f"{rows[0].memory.peak / 1e6:.2f}", "yes"] and float(cells[0][-2]) > 1
    speed = cells[-2]  # after the sum that it comes from, before the run
    assert speed[1] == f"{rows[0].speed.inside / 1e6:.2f}" and float(speed[1]) > 0.1
    assert "memory of a rank, GB, of 80.0 GB" in printed_estimate(load_config("llama-7b"), Machine(gpus=8))


def test_why_zero_0_and_1_are_equal_is_said_where_they_are():
    for options, expected in (
        (["--train.precision=bf16"], 1),
        (["--train.precision=fp32"], 0),
        (["--train.precision=bf16", "--distributed.offload_optimizer=true"], 0),
    ):
        config = load_config("debug", options)
        assert printed_estimate(config, Machine(gpus=2)).count("ZeRO 0 and 1 are the same in bf16") == expected
    wide = Console(record=True, file=io.StringIO())
    print_memory(wide, estimate(load_config("llama-7b"), Machine(gpus=8)), None)
    assert "shards the fp32 weights" in wide.export_text()


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
        match = re.match(r"\s*([\d, ]*?)\s*([\d,]+) x (\d+) x (\d+) x (\d+) +[\d.]+ ", line)
        if match:
            stage = match[1] or stage
            numbers = [int(number.replace(",", "")) for number in match.groups()[1:]]
            sums[stage] = sums.get(stage, 0) + prod(numbers) * (ranks - 1) / ranks
    sums |= dict.fromkeys("01", sums["0, 1"]) if "0, 1" in sums else {}
    for row in rows:
        assert sums[str(row.stage)] == pytest.approx(sum(c.sent(ranks) for c in row.moved), rel=1e-12)
    total = rows[3].moved[1].elements
    if match := re.search(r"in a micro-batch: ([\d, x+]+) = ([\d,]+) elements(, before each is padded)?", text):
        products = [map(int, product.replace(",", "").split(" x ")) for product in match[1].split(" + ")]
        elements = int(match[2].replace(",", ""))
        assert sum(map(prod, products)) == elements
        assert elements == total if not match[3] else elements < total < elements + 2 * ranks * 200
    else:
        assert total == 0
