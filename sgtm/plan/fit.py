"""What does not divide or does not fit, said before anything is allocated, with what would."""

from __future__ import annotations

from sgtm.config.schema import Config
from sgtm.plan.memory import memory

STAGES = (0, 1, 2, 3)
GB = 1e9


def check_divides(config: Config, ranks: int) -> int:
    """Accumulation of a run on `ranks` ranks. Raises ValueError that names what would divide."""
    try:
        return config.accumulation(ranks)
    except ValueError as error:
        sequences, context = config.sequences_per_step, config.model.context
        fits = [n for n in range(1, config.train.micro_batch + 1) if _divides(config, ranks, n)]
        if fits:
            raise ValueError(f"{error}; train.micro_batch {_listed(fits)} would") from None
        if sequences % ranks:
            near = [n * ranks * context for n in (sequences // ranks, sequences // ranks + 1) if n]
            counts = [n for n in range(1, ranks) if sequences % n == 0][-3:]
            raise ValueError(
                f"{error}; with train.micro_batch 1 train.tokens_per_step {_listed(near)} would, and so would "
                f"{_listed(counts)} ranks"
            ) from None
        raise


def check_fits(config: Config, ranks: int, limit: float, whose: str) -> None:
    """Raise ValueError where a rank needs more than `limit` bytes, with what would fit.

    whose  what the limit is of, for the message
    """
    stage = config.distributed.zero_stage
    needed = memory(config, stage, ranks).peak
    if needed <= limit:
        return
    tried = []
    stages = [s for s in STAGES if s > stage and memory(config, s, ranks).peak <= limit]
    tried += [f"distributed.zero_stage {_listed(stages)}"] if stages else []
    smaller = [n for n in range(1, config.train.micro_batch) if _divides(config, ranks, n)]
    batches = [n for n in smaller if memory(with_micro_batch(config, n), stage, ranks).peak <= limit]
    tried += [f"train.micro_batch {_listed(batches)}"] if batches else []
    if not config.model.activation_checkpointing:
        recomputing = config.model_copy(update={"model": config.model.model_copy(update=CHECKPOINTED)})
        if memory(recomputing, stage, ranks).peak <= limit:
            tried.append("model.activation_checkpointing true")
    if not tried:
        least = config.model_copy(update={"model": config.model.model_copy(update=CHECKPOINTED)})
        least = with_micro_batch(least, n := min(smaller, default=config.train.micro_batch))
        if memory(least, 3, ranks).peak <= limit:
            together = f"train.micro_batch {n} and model.activation_checkpointing true"
            tried.append(f"distributed.zero_stage 3, {together} together")
    advice = f"what fits: {'; or '.join(tried)}" if tried else "no stage and no micro-batch fits: take more ranks"
    raise ValueError(
        f"distributed.zero_stage {stage} with train.micro_batch {config.train.micro_batch} on {ranks} ranks needs "
        f"about {needed / GB:.1f} GB on each, more than the {limit / GB:.1f} GB of {whose}; {advice}"
    )


CHECKPOINTED = {"activation_checkpointing": True}


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def _divides(config: Config, ranks: int, micro_batch: int) -> bool:
    try:
        with_micro_batch(config, micro_batch).accumulation(ranks)
    except ValueError:
        return False
    return True


def _listed(values: list[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
