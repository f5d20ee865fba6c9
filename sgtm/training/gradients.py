"""Gradient norms by group, and by label and group; from the shards, without gathering a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from sgtm.data.batch import IGNORE, Batch
from sgtm.distributed.engine import Engine
from sgtm.masking.labels import JOINT
from sgtm.training.step import train_step
from sgtm_kernels.plan import Tables


def group_norms(key_norms: Mapping[str, float], groups: Iterable[str]) -> dict[str, float]:
    """L2 norm by group from norms by key (sgtm/model/rows.py); `joint`: of all weights that no group owns."""
    norms = dict.fromkeys((*groups, JOINT), 0.0)
    for key, norm in key_norms.items():
        _, owned, group = key.partition(".")
        name = group if owned else JOINT
        norms[name] = math.hypot(norms[name], norm)
    return norms


def probe(engine: Engine, batches: list[Batch], tables: Tables) -> dict[str, dict[str, float]]:
    """{label: {group: L2 norm}} of the gradient that each label's targets bring to this step, for labels it has.

    Only the label's targets are counted and the masks stay as they are: where the method keeps a label from a group,
    the norm is exactly 0. Losses are divided by the targets of the whole step, so that the gradients of all labels add
    up to the step's. Nothing is updated; it takes the time of one step for each label. A collective call.
    """
    norms = {}
    for label in sorted(batches[0].step_labels):
        train_step(engine, [only(batch, label) for batch in batches], tables, 0.0, None, measure=True)
        norms[tables.labels[label]] = group_norms(engine.key_norms(), tables.groups)
    return norms


def only(batch: Batch, label: int) -> Batch:
    """The batch with the targets of this label alone; the others are `IGNORE`."""
    labels = torch.repeat_interleave(torch.tensor(batch.labels), torch.tensor(batch.lengths))
    return replace(batch, targets=batch.targets.masked_fill(labels.view_as(batch.targets) != label, IGNORE))
