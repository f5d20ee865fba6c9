"""The start of a run: the dry run launches the kernels under every mask that training will have.

That it changes no bit of the model is in tests/e2e/test_train.py.
"""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from sgtm.training import start as module
from sgtm_kernels.plan import MAX_SLICES
from sgtm_kernels.signature import signature_of


def batches_of(monkeypatch, backend: str, accumulation: int, **keys):
    config = tiny_config(model={"context": 48}, train={"tokens_per_step": 8 * 48}, masking=keys.pop("masking", {}))
    data = {key: keys.pop(key) for key in ("mixing", "isolate_documents") if key in keys}
    data = config.data.model_copy(update=data)
    config = config.model_copy(update={"data": data, "train": config.train.model_copy(update=keys)})
    steps = []
    monkeypatch.setattr(module, "train_step", lambda engine, batches, *rest: steps.append(batches))
    engine = SimpleNamespace(config=config, module=SimpleNamespace(backend=backend), accumulation=accumulation)
    module.dry_run(engine, config.tables)
    assert all(len(step) == accumulation for step in steps)
    return config, [batch for step in steps for batch in step]


def test_without_a_compiler_one_step_is_enough(monkeypatch):
    _, batches = batches_of(monkeypatch, "torch", 2, mixing="token")
    assert [batch.labels for batch in batches] == [(0,), (0,)]


@pytest.mark.parametrize("mixing", ["step", "micro", "sequence", "token"])
@pytest.mark.parametrize("sequences", [1, 5])
@pytest.mark.parametrize("isolated", [False, True])
def test_all_masks_that_the_mixing_makes(monkeypatch, mixing, sequences, isolated):
    config, batches = batches_of(
        monkeypatch, "triton", 2, mixing=mixing, micro_batch=sequences, isolate_documents=isolated
    )
    labels = range(len(config.tables.labels))
    plans = [batch.plan(config.tables) for batch in batches]
    assert {plan.present for plan in plans} >= {(label,) for label in labels}
    assert {plan.documents is not None for plan in plans} == {isolated or mixing == "token"}
    for plan in plans:
        assert all(start // plan.seq_len == (end - 1) // plan.seq_len for start, end in plan.documents or ())
    mixed = [plan for plan in plans if len(plan.present) > 1]
    assert bool(mixed) == (mixing == "token" or (mixing == "sequence" and sequences > 1))
    for plan in mixed:
        assert plan.present == tuple(labels)
        assert plan.whole_sequences == (mixing == "sequence")
        if mixing == "token":
            assert all(sum(run.label == label for run in plan.label_runs) > MAX_SLICES for label in labels)


@pytest.mark.parametrize("mixing", ["step", "micro", "sequence", "token"])
@pytest.mark.parametrize("sequences", [1, 2, 3, 5])
@pytest.mark.parametrize("domains", [("es",), ("de", "es")])
def test_every_mix_of_labels_finds_its_graph(monkeypatch, mixing, sequences, domains):
    monkeypatch.setattr(module, "_evaluate", lambda *arguments: None)
    masking = {"joint": "masked", "domains": domains}
    config, batches = batches_of(
        monkeypatch, "torch", 1, mixing=mixing, micro_batch=sequences, compile="blocks", masking=masking
    )
    labels = range(len(config.tables.labels))
    most = {"sequence": min(sequences, len(labels)), "token": len(labels)}.get(mixing, 1)
    mixes = [mix for count in range(1, most + 1) for mix in combinations(labels, count)]
    made = {signature_of(config.tables, tuple(sorted({*batch.labels})), False) for batch in batches}
    assert {signature_of(config.tables, mix, False) for mix in mixes} == made
    assert all(len({*batch.labels}) <= most for batch in batches)


def test_out_of_memory_in_the_dry_run_is_an_error_with_the_keys_to_change(monkeypatch):
    def large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    config = tiny_config()
    engine = SimpleNamespace(config=config, module=SimpleNamespace(backend="torch"), accumulation=1)
    monkeypatch.setattr(module, "train_step", large)
    with pytest.raises(ValueError) as error:
        module.dry_run(engine, config.tables)
    assert str(error.value) == (
        "a step does not fit into memory (CUDA out of memory); lower train.micro_batch 2, raise "
        "distributed.zero_stage 1, or set model.activation_checkpointing"
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, None), ('{"removed": ["es"]}', {"removed": ["es"]}), ("{", {}), ("[1]", {}), (b"\xff", {})],
    ids=["none", "whole", "half", "no mapping", "not UTF-8"],
)
def test_a_damaged_export_record_certifies_nothing(tmp_path, content, expected):
    config = tiny_config(train={"init_from": str(tmp_path)})
    if content is not None:
        (tmp_path / "sgtm_export.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert module.export_record(config) == expected
    assert module.export_record(tiny_config()) is None
