"""Resumes a run from its newest valid checkpoint, on whatever ranks there are now.

On as many ranks, in the same ZeRO stage, with the same micro-batch, a resumed run is bitwise the uninterrupted one
(tests/dist/test_checkpoint.py): weights, moments and step counts come from the files, the learning rate and the data
are functions of the step. Otherwise it trains on the same sequences in the same steps, and sums are added in another
order (tests/dist/test_storage.py has the bound).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

from sgtm.config.reference import flat, section
from sgtm.config.schema import Config
from sgtm.distributed.on_ranks import on_every_rank, on_rank_zero
from sgtm.process.ranks import on_one_machine
from sgtm.run.checkpoint import (
    check_same_corpus,
    finished,
    newest_whole,
    none_whole,
    read_manifest,
    resolved,
    set_aside,
    verify,
)

if TYPE_CHECKING:
    from sgtm.distributed.engine import Engine

TRAIN_ON = (
    "\nthe learning rate follows train.steps; to train on, export the run and start another from it with "
    "--train.init_from (docs/training.md)"
)
# What a run must share with its checkpoint to be its continuation, less what changes no number,
SAME = (
    "model",
    "masking",
    "data",
    "optimizer",
    "steering",
    "train.steps",
    "train.tokens_per_step",
    "train.precision",
    "train.init_from",
    "train.expert_balance",
    "kernels.backend",
)
# Data and direction are known by their content.
MAY_DIFFER = ("model.activation_checkpointing", "data.path", "steering.direction")
# and what changes only the order in which sums are added, or where they are rounded.
SHAPE = (
    "train.micro_batch",
    "train.compile",
    "distributed.zero_stage",
    "distributed.offload_optimizer",
    "distributed.communication",
)


def resume_command(run: Path, ranks: int) -> str:
    """How to resume the run: a command where it ran on one machine, what to change where it ran on several."""
    if ranks == 1:
        return f"sgtm train {run} --resume"
    if not on_one_machine():
        return f"start all nodes as before, with the arguments: {run} --resume"
    return f"torchrun --standalone --nproc_per_node {ranks} -m sgtm train {run} --resume"


def find_whole(run_dir: Path | str, rank: int, ranks: int, write: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is none at all; all ranks divide the reading.

    Damaged newer ones are quarantined and reported. If there are some and none is valid, nothing is changed and every
    rank raises ValueError.
    """
    checkpoints = on_rank_zero(lambda: finished(run_dir))

    def check(directory: Path) -> None:
        on_every_rank(lambda: verify(directory, (rank, ranks)))

    newest, wrong = newest_whole(checkpoints, check)
    if newest is None:
        if wrong:
            raise ValueError(none_whole(wrong))
        return None
    for directory, problem in wrong.items():
        aside = on_rank_zero(partial(set_aside, directory))
        write(f"warning: {problem}; quarantined as {aside.name}, resuming from {newest.name}")
    return newest


def load_checkpoint(
    engine: Engine, directory: Path | str, config: Config, corpus: str = "", direction: str | None = None
) -> tuple[int, list, str]:
    """Resume from a valid checkpoint: weights, optimizer and random states.

    corpus     fingerprint of the data
    direction  SHA-256 of the file of `steering.direction`

    Returns the number of global steps done, what every rank saved as `progress`, and a text of what differs now, or
    an empty one. Every rank raises ValueError for a checkpoint whose run differs from `config`, naming the keys.
    """
    directory = Path(directory)
    manifest = on_rank_zero(lambda: _manifest_of_this_run(directory, config, corpus, direction))
    state = engine.load(directory)
    ranks = state["ranks"]
    mine = ranks[engine.rank % len(ranks)]
    torch.set_rng_state(mine["random"]["cpu"])
    if engine.device.type == "cuda" and "cuda" in mine["random"]:
        torch.cuda.set_rng_state(mine["random"]["cuda"], engine.device)
    progress = [rank["progress"] for rank in ranks]
    return state["step"], progress, _reshaped(manifest, config, engine.world_size)


def differences(saved: dict, config: Config, keys: tuple[str, ...] = SAME) -> list[str]:
    """`key: saved, now` for every one of `keys`, or key in such a section, in which a saved config is not `config`."""
    # Keys that are younger than the checkpoint had their default when it was written.
    before, now = flat(_with_defaults(Config, saved)), flat(resolved(config))
    before["kernels.backend"] = re.sub(r"\bruns\b", "torch", str(before["kernels.backend"]))  # as versions before 0.2
    those = [key for key in now | before if f"{key}.".startswith(tuple(f"{same}." for same in keys))]
    changed = [key for key in those if before.get(key) != now.get(key) and key not in MAY_DIFFER]
    by = {"kernels.backend": " by SGTM_KERNELS"} if os.environ.get("SGTM_KERNELS") else {}
    if (share := config.optimizer.warmup_steps) and share < 1 and "train.steps" in changed:
        by["optimizer.warmup_steps"] = f", as {share:g} of train.steps"
    return [f"{key}: {before.get(key)} in the checkpoint, {now.get(key)} now{by.get(key, '')}" for key in changed]


def _with_defaults(schema: type[BaseModel], values: dict) -> dict:
    """These values, and the default of every key that they lack."""
    complete = dict(values)
    for name, field in schema.model_fields.items():
        if inner := section(field):
            complete[name] = _with_defaults(inner, values.get(name, {}))
        elif not field.is_required():
            complete.setdefault(name, field.get_default(call_default_factory=True))
    return complete


def _manifest_of_this_run(directory: Path, config: Config, corpus: str, direction: str | None = None) -> dict:
    """The manifest; raises ValueError unless the run is the one that `config` describes."""
    manifest = read_manifest(directory)
    changed = differences(manifest["config"], config)
    own = f"\nsgtm train {directory.parents[1]} --resume takes those of the run; for others, set another --name"
    longer = any(change.startswith("train.steps:") for change in changed)
    remedy = (own + TRAIN_ON * longer) if changed else ""
    otherwise = "give its folder with --data.path, or set another --name"
    try:
        check_same_corpus(directory.parents[1], manifest, config.data.path, corpus, otherwise)
    except ValueError as error:
        changed.append(f"data.path: {error}")
    if manifest["direction"] != direction:
        before = f"a file with SHA-256 {manifest['direction']}" if manifest["direction"] else "none"
        now = f"{config.steering.direction} with SHA-256 {direction}" if direction else "none"
        changed.append(f"steering.direction: {before} in the checkpoint, {now} now; restore it, or set another --name")
    if changed:
        raise ValueError(f"{directory} was written with other settings:\n  " + "\n  ".join(changed) + remedy)
    return manifest


def _reshaped(manifest: dict, config: Config, ranks: int) -> str:
    changed = differences(manifest["config"], config, SHAPE)
    if manifest["ranks"] != ranks:
        changed.append(f"ranks: {manifest['ranks']} in the checkpoint, {ranks} now")
    return f"same data in the same order, sums in another ({'; '.join(changed)})" if changed else ""
