"""One micro-batch: its plan, and its way to a device."""

import pytest
import torch

from sgtm.data.batch import Batch
from sgtm.masking.labels import LabelSpace
from sgtm.masking.strategy import build_tables

TABLES = build_tables(LabelSpace(("forget",)), "sgtm", "masked")


def batch_of(labels: tuple[int, ...], lengths: tuple[int, ...], documents=None) -> Batch:
    ids = torch.arange(21).view(3, 7)
    return Batch(ids, ids.roll(-1, 1), labels, lengths, documents, 21, frozenset(labels))


BATCHES = {
    "whole sequences": batch_of((2, 0), (7, 14)),
    "labels inside sequences": batch_of((0, 2, 1, 2, 0), (3, 5, 1, 6, 6)),
    "many slices, documents": batch_of((0, 2) * 10, (1,) * 19 + (2,), ((0, 3), (3, 7), (7, 14), (14, 19), (19, 21))),
}


def test_neighbours_of_one_label_are_one_run_of_the_plan():
    documents = ((0, 7), (7, 14), (14, 21))
    plan = batch_of((2, 2, 0, 0, 2), (3, 4, 0, 8, 6), documents).plan(TABLES)
    assert [tuple(run) for run in plan.label_runs] == [(2, 0, 7), (0, 7, 15), (2, 15, 21)]
    assert (plan.batch, plan.seq_len, plan.documents, plan.tables) == (3, 7, documents, TABLES)


def test_on_a_cpu_nothing_is_copied():
    batch = BATCHES["whole sequences"]
    ids, targets, plan = batch.on(torch.device("cpu"), TABLES)
    assert ids is batch.input_ids and targets is batch.targets and plan.label_runs == batch.plan(TABLES).label_runs


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_copied_is_the_batch_and_the_plan(name, monkeypatch):
    """On a CPU that passes for a GPU: every part is where it is looked for, in one pinned copy, without waiting."""
    batch = BATCHES[name]
    cpu = torch.device("cpu")

    class Elsewhere:
        type = "cuda"

    empty, pinned, waited = torch.empty, [], []

    def unpinned(*size, pin_memory=False, **options):
        pinned.append(pin_memory)
        return empty(*size, **options)

    def copied(tensor, to, *_, non_blocking=False, **__):
        if isinstance(to, Elsewhere):
            waited.append(not non_blocking)
        return tensor.clone()

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    ids, targets, plan = batch.on(Elsewhere(), TABLES)
    monkeypatch.undo()
    assert (pinned, waited) == ([True], [False])
    wanted = batch.plan(TABLES)
    assert torch.equal(ids, batch.input_ids) and torch.equal(targets, batch.targets)
    assert torch.equal(plan.labels(cpu), wanted.labels(cpu)) and plan.labels(cpu).dtype == torch.int32
    assert torch.equal(plan.spans(cpu), wanted.spans(cpu)) and plan.spans(cpu).dtype == torch.int32
    assert plan.labels(cpu).data_ptr() != wanted.labels(cpu).data_ptr()
