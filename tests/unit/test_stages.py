"""What divides and what fits, and what an error advises where it does not."""

import re
from dataclasses import replace

import pytest

from sgtm.config import load_config
from sgtm.estimate.memory import memory
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import arithmetic, check_divides, check_fits, estimate, recommended


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (512, "512 ranks x train.micro_batch 4; with train.micro_batch 1 train.tokens_per_step 2097152 would, and so "
              "would 64, 128 or 256 ranks"),
        (128, "128 ranks x train.micro_batch 4; train.micro_batch 1 or 2 would"),
        (21, "21 ranks x train.micro_batch 4; train.tokens_per_step 1032192 or 1376256 would, and so would 4, 8 or "
             "16 ranks"),
    ],
)  # fmt: skip
def test_what_does_not_divide_names_what_would(ranks, message):
    with pytest.raises(ValueError, match=message):
        check_divides(load_config("llama-1b", ["--train.micro_batch=4"]), ranks)


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (512, (), ": 256 sequences per step do not divide among 512 ranks; train.tokens_per_step 2097152 would, "
                  "and so would 64, 128 or 256 ranks"),
        (21, (), "among 21 ranks; train.tokens_per_step 1032192 or 1118208 would, and so would 4, 8 or 16 ranks"),
        (8, ("--data.mixing=micro", "--data.micro_blocks=3"), "8 ranks x data.micro_blocks 3; train.tokens_per_step "),
    ],
)  # fmt: skip
def test_a_derived_micro_batch_that_no_number_of_sequences_gives(ranks, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_divides(load_config("llama-1b", list(options)), ranks)


@pytest.mark.parametrize("ranks", [3, 5, 7, 9, 21])
@pytest.mark.parametrize("options", [(), ("--data.mixing=micro", "--data.micro_blocks=3", "--train.micro_batch=2")])
def test_the_steps_and_ranks_that_are_named_divide_with_the_micro_batch_as_it_is(ranks, options):
    options = ["--train.tokens_per_step=65536", "--train.micro_batch=4", *options]  # 1024 sequences
    with pytest.raises(ValueError, match="would") as refused:
        check_divides(load_config("debug", options), ranks)
    advice = str(refused.value).rpartition("; ")[2]
    steps, _, counts = advice.partition(" would")
    assert steps.startswith("train.tokens_per_step ")
    for step in re.findall(r"\d+", steps):
        assert check_divides(load_config("debug", [*options, f"--train.tokens_per_step={step}"]), ranks)
    assert bool(counts) == (len(options) == 2)  # in threes no number of ranks divides 1024
    for count in re.findall(r"\d+", counts):
        assert check_divides(load_config("debug", options), int(count))


HPZ = ("--distributed.zero_stage=3", "--distributed.zero_hpz_partition_size=4")


def test_hpz_is_refused_in_the_engines_words():
    from sgtm.distributed.engine import deepspeed_config

    config = load_config("debug", list(HPZ))
    for refuses in (lambda: check_divides(config, 2), lambda: deepspeed_config(config, 2, 100)):
        with pytest.raises(ValueError, match=r"^distributed\.zero_hpz_partition_size 4 does not divide .* ranks 2$"):
            refuses()
    assert check_divides(config, 4) == 1


def test_one_is_singular():
    config = load_config("debug", ["--train.micro_batch=1"])
    assert "\n1 rank = 1 node x 1\n" in arithmetic(config, Machine())
    assert "= 1 rank x 8 accumulation x 1 sequence x 64 tokens" in arithmetic(config, Machine())
    assert "\n4 ranks = 2 nodes x 2\n" in arithmetic(config, Machine(2, 2))
    with pytest.raises(ValueError, match="on 1 rank needs about"):
        check_fits(config, 1, 1, "a GPU")


def test_what_does_not_fit_names_what_would():
    config = load_config("llama-1b", ["--distributed.zero_stage=1"])
    needed = memory(config, 1, 8).peak
    check_fits(config, 8, needed, "a GPU")
    error = f"zero_stage 1 with train.micro_batch 4 on 8 ranks needs about {needed / 1e9:.1f} GB on each, more than the"
    with pytest.raises(ValueError, match=error) as refused:
        check_fits(config, 8, needed - 1, "a GPU")
    assert "of a GPU; what fits: distributed.zero_stage 2 or 3; or train.micro_batch 1 or 2" in str(refused.value)
    with pytest.raises(ValueError, match="no stage and no micro-batch fits: take more ranks"):
        check_fits(config, 8, 3e9, "a GPU")
    plain = load_config("llama-1b", ["--model.activation_checkpointing=false", "--distributed.zero_stage=3"])
    with pytest.raises(ValueError, match=r"what fits: .*model\.activation_checkpointing true"):
        check_fits(plain, 8, 12e9, "a GPU")


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
