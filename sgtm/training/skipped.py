"""Reports steps that were skipped because loss or gradient was not finite, and ends the run after too many."""

from __future__ import annotations

import math
from pathlib import Path

from sgtm.config.schema import Config
from sgtm.data.loader import Loader
from sgtm.data.store import Corpus
from sgtm.distributed.engine import Engine
from sgtm.distributed.on_ranks import on_every_rank, on_rank_zero
from sgtm.run.checkpoint import find_latest
from sgtm.run.resume import resume_command
from sgtm.words import counted

NAMED = 5
"""Documents of a micro-batch that a message names."""


def describe_skipped(
    engine: Engine, loader: Loader, corpus: Corpus, config: Config, run: Path, step: int, in_a_row: int
) -> str:
    """The line about a step (counted from 0) that the engine has just skipped. All ranks call this.

    in_a_row  skipped steps up to and with this one
    Every rank raises ValueError with what to do where they are `train.max_skipped_steps`.
    """
    losses = on_every_rank(lambda: [float(loss) for loss in engine.losses])

    def line() -> str:
        reason = f"step {step + 1}: {_reason(losses, loader, corpus, step)}"
        if not 0 < config.train.max_skipped_steps <= in_a_row:
            everything = len(engine.skipped) == len(config.space.groups)
            return f"{reason}; {'nothing' if everything else 'nothing of ' + ', '.join(engine.skipped)} was updated"
        latest = find_latest(run)
        remedies = [
            "lower optimizer.lr, with another --name",
            "prepare the data without these documents, with another --name",
        ]
        if latest:
            again = resume_command(run, engine.world_size)
            remedies.append(f"skip past them: {again} --train.max_skipped_steps 0")
        lines = [
            f"the run ends: {counted(in_a_row, 'step in a row was', 'steps in a row were')} skipped "
            f"(train.max_skipped_steps)",
            reason,
            f"the last checkpoint is {latest}" if latest else "no checkpoint was saved before",
            "what to do, one of:",
            *(f"  {remedy}" for remedy in remedies),
        ]
        raise ValueError("\n".join(lines))

    return on_rank_zero(line)


def _reason(losses: list[list[float]], loader: Loader, corpus: Corpus, step: int) -> str:
    """What was not finite, and the documents of the worst micro-batch; losses: by rank and micro-batch."""
    by_position = {(rank, index): loss for rank, mine in enumerate(losses) for index, loss in enumerate(mine)}
    wrong = [position for position, loss in by_position.items() if not math.isfinite(loss)]
    rank, index = wrong[0] if wrong else max(by_position, key=lambda position: by_position[position])
    micro_batch = f"micro-batch {index + 1} of rank {rank}"
    documents = loader.documents(step, rank, index)
    named = ", ".join(_name(corpus, document) for document in documents[:NAMED])
    more = f" and {len(documents) - NAMED} more" if len(documents) > NAMED else ""
    if wrong:
        others = f" and {len(wrong) - 1} more micro-batches" if len(wrong) > 1 else ""
        what = f"the loss is {by_position[rank, index]} in {micro_batch}{others}"
    else:
        what = f"the gradient is not finite, the losses are; the largest is that of {micro_batch}"
    return f"{what}, which reads documents {named}{more}"


def _name(corpus: Corpus, document: int) -> str:
    """A document as its owner finds it: position and category in the corpus, and how its text begins."""
    category = list(corpus.categories)[corpus.documents["category"][document]]
    text = " ".join(corpus.tokenizer.decode(corpus.tokens(document)[:24].tolist()).split())
    return f"{document} ({category}, {text[:40]!r})"
