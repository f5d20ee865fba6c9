"""What does not divide or does not fit, said before anything is allocated, with what would."""

from __future__ import annotations

from sgtm.config.errors import ConfigError
from sgtm.config.schema import Config
from sgtm.estimate.memory import memory
from sgtm.estimate.units import amount, counted, listed

STAGES = (0, 1, 2, 3)


def check_divides(config: Config, ranks: int) -> int:
    """Accumulation of a run on `ranks` ranks. Raises ConfigError that names what would divide."""
    try:
        config.distributed.check_ranks(ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return config.accumulation(ranks)
    except ValueError as error:
        fits = [n for n in range(1, (config.train.micro_batch or 0) + 1) if _divides(config, ranks, n)]
        advice = f"train.micro_batch {listed(fits)} would" if fits else _other_steps(config, ranks)
        raise ConfigError(f"{error}; {advice}") from None


def _other_steps(config: Config, ranks: int) -> str:
    """Tokens per step and numbers of ranks that divide, with the micro-batch as it is where a step has one of each
    rank, else with 1."""
    sequences, size = config.sequences_per_step, config.train.micro_batch or 1
    blocks = config.data.micro_blocks if config.data.mixing == "micro" else 1
    micro_batch = size if sequences >= size * blocks * ranks else 1
    least = micro_batch * blocks * ranks
    near = [n * least * config.model.context for n in (sequences // least, sequences // least + 1) if n]
    counts = [n for n in range(1, ranks) if _divides(config, n, micro_batch)][-3:]
    changed = "" if micro_batch == size else f"with train.micro_batch {micro_batch} "
    others = f", and so would {listed(counts)} rank{'' if counts == [1] else 's'}" if counts else ""
    return f"{changed}train.tokens_per_step {listed(near)} would{others}"


def check_fits(config: Config, ranks: int, limit: float, whose: str) -> None:
    """Raise ValueError where a rank needs more than `limit` bytes, with what would fit.

    whose  what the limit is of, for the message
    """
    config, stage = config.for_ranks(ranks), config.distributed.zero_stage
    needed = memory(config, stage, ranks).peak
    if needed <= limit:
        return
    tried = []
    stages = [s for s in STAGES if s > stage and memory(config, s, ranks).peak <= limit]
    tried += [f"distributed.zero_stage {listed(stages)}"] if stages else []
    smaller = [n for n in range(1, config.micro_batch) if _divides(config, ranks, n)]
    batches = [n for n in smaller if memory(with_micro_batch(config, n), stage, ranks).peak <= limit]
    tried += [f"train.micro_batch {listed(batches)}"] if batches else []
    single = _changed(config, "distributed", zero_hpz_partition_size=1)
    if memory(single, stage, ranks).peak <= limit:
        tried.append("distributed.zero_hpz_partition_size 1")
    if memory(_changed(config, "model", activation_checkpointing=True), stage, ranks).peak <= limit:
        tried.append("model.activation_checkpointing true")
    if not tried:
        least = _changed(single, "model", activation_checkpointing=True)
        least = with_micro_batch(least, n := min(smaller, default=config.micro_batch))
        if memory(least, 3, ranks).peak <= limit:
            hpz = " distributed.zero_hpz_partition_size 1," if config.distributed != single.distributed else ""
            together = f"train.micro_batch {n} and model.activation_checkpointing true"
            tried.append(f"distributed.zero_stage 3,{hpz} {together} together")
    advice = f"what fits: {'; or '.join(tried)}" if tried else "no stage and no micro-batch fits: take more ranks"
    raise ValueError(
        f"distributed.zero_stage {stage} with train.micro_batch {config.micro_batch} on "
        f"{counted(ranks, 'rank')} needs about {amount(needed)} on each, more than the {amount(limit)} of {whose}; "
        f"{advice}"
    )


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    return _changed(config, "train", micro_batch=micro_batch)


def _changed(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _divides(config: Config, ranks: int, micro_batch: int) -> bool:
    try:
        with_micro_batch(config, micro_batch).accumulation(ranks)
    except ValueError:
        return False
    return True
