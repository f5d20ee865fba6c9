"""The trainer of torchtitan under FSDP2 on two ranks, with masks: sgtm/integrations/torchtitan.py.

All that the ranks do is one call, as the imports of torchtitan take ten seconds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import differing
from hf_steps import OWN, STEPS, pieces_of
from ranks import run_ranks

TITAN = Path(__file__).parents[2] / ".venv" / "torchtitan" / "torchtitan"
pytestmark = pytest.mark.skipif(not TITAN.is_dir(), reason="no torchtitan: make test installs it")


def name_of(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def on_two_ranks(folder: str) -> dict[str, Any]:
    import titan_models as titan
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

    training = titan.trainer_config().training
    replicated = replace(
        titan.trainer_config().parallelism, data_parallel_replicate_degree=2, data_parallel_shard_degree=1
    )
    chunked = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=titan.trainer_config().loss)
    apart = replace(training, local_batch_size=1, global_batch_size=4)
    kinds = {
        "plain": {},
        "selective": {"activation_checkpoint": SelectiveAC.Config(), "loss": chunked},
        "accumulated": {"training": apart, "activation_checkpoint": FullAC.Config(), "loss": chunked},
        "apart": {"model": titan.llama_config(fused=False)},
        "narrow": {"training": replace(apart, mixed_precision_param="bfloat16")},
        "replicated": {"parallelism": replicated},
    }
    facts: dict[str, Any] = {kind: trained(titan, **changes) for kind, changes in kinds.items()}
    facts["one process"] = {fused: one_process(titan, fused) for fused in (True, False)}
    facts["resumed"] = resumed(titan, folder)
    facts["evaluated"] = evaluated(titan)
    facts["loaded"] = loaded(titan)
    return facts


def batches_of(titan, size: int, first: int = 0) -> list[list]:
    """For each rank, micro-batches of `size` sequences of all steps: `(seed, labels)`."""
    return [
        [
            (1000 * number + 100 * rank + row, STEPS[number][rank][row : row + size])
            for number in range(first, len(STEPS))
            for row in range(0, 2, size)
        ]
        for rank in range(2)
    ]


def sequences(titan, number: int, rank: int, size: int):
    """The sequences of a step of a rank as the trainer's micro-batches of `size` have them."""
    parts = [titan.batch_of(seed, labels) for seed, labels in batches_of(titan, size)[rank]]
    parts = parts[number * 2 // size : (number + 1) * 2 // size]
    return torch.cat([inputs["input"] for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


def build(titan, first: int = 0, **changes):
    """A trainer with given weights and batches."""
    from torch.distributed.tensor import distribute_tensor

    size = changes.get("training", titan.trainer_config().training).local_batch_size
    config = titan.masked_config(dataloader=titan.Given.Config(batches=batches_of(titan, size, first)), **changes)
    fused = hasattr(config.model_spec.model.layers[0].attention.qkv_linear, "wqkv")
    trainer = config.build()
    whole = dict(titan.masked_llama(titan.llama_config(fused)).named_parameters())
    with torch.no_grad():
        for name, parameter in trainer.model_parts[0].named_parameters():
            parameter.copy_(distribute_tensor(whole[name_of(name)].data, parameter.device_mesh, parameter.placements))
    return trainer


def steps(trainer, count: int):
    iterator = trainer.batch_generator(trainer.dataloader)
    for _ in range(count):
        trainer.step += 1
        trainer.train_step(iterator)
        yield weights_of(trainer)


def weights_of(trainer) -> dict:
    (model,) = trainer.model_parts
    return pieces_of(model, {name_of(name): p.full_tensor() for name, p in model.named_parameters()})


def moments_of(trainer) -> list[dict]:
    (model,), (optimizer,) = trainer.model_parts, trainer.optimizers
    return [
        pieces_of(model, {name_of(n): optimizer.state[p][key].full_tensor() for n, p in model.named_parameters()})
        for key in ("exp_avg", "exp_avg_sq")
    ]


def trained(titan, **changes) -> tuple[list[dict], list[list[dict]], set[str]]:
    trainer = build(titan, **changes)
    history, states = [weights_of(trainer)], []
    for weights in steps(trainer, len(STEPS)):
        history.append(weights)
        states.append(moments_of(trainer))
    return history, states, {type(optimizer).__name__ for optimizer in trainer.optimizers}


def one_process(titan, fused: bool) -> dict[int, list[dict]]:
    """Weights before the first step and after each, of micro-batches of two sequences and of one."""
    from sgtm.integrations.optimizer import SgtmAdamW

    results = {}
    for size in (1, 2):
        model = titan.masked_llama(titan.llama_config(fused))
        optimizer = SgtmAdamW(model, **titan.OPTIONS)
        history = [pieces_of(model, dict(model.named_parameters()))]
        for number, labels in enumerate(STEPS):
            for rank in range(2):
                ids, targets = sequences(titan, number, rank, size)
                loss = titan.loss_of(model(ids, sgtm_labels=labels[rank]), targets)
                (loss / (4 * titan.CONTEXT)).backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(pieces_of(model, dict(model.named_parameters())))
        results[size] = history
    return results


def resumed(titan, folder: str) -> list[tuple[dict, dict, list[dict]]]:
    """Steps counted, weights and moments after three steps: without a pause, and from a checkpoint after two."""
    from torchtitan.components.checkpointer import CheckpointManager

    results = []
    for first in (0, 2):
        checkpoint = CheckpointManager.Config(enable=True, interval=2)
        trainer = build(titan, first, checkpoint=checkpoint, dump_folder=folder)
        if first:
            trainer.checkpointer.load(step=2)
        for _ in steps(trainer, 3 - trainer.step):
            if trainer.step == 2:
                trainer.checkpointer.save(2)
        (optimizer,) = trainer.optimizers
        results.append((dict(optimizer.param_groups[0]["steps"]), weights_of(trainer), moments_of(trainer)))
        trainer.close()
    return results


def evaluated(titan) -> list[torch.Tensor]:
    """Logits of the full and the ablated model, sharded and whole."""
    from sgtm.integrations.torchtitan import ablate

    trainer, whole, results = build(titan), titan.masked_llama().eval(), []
    ids, _ = sequences(titan, 0, 0, 2)
    for model in (trainer.model_parts[0].eval(), whole):
        for domains in ([], ["bio"]):
            with torch.no_grad(), ablate(model, domains):
                results.append(model(ids))
    return results


def loaded(titan) -> list[dict]:
    """Weights before and after two steps with the loader, whose every source is one of bio."""
    config = titan.loader_config()
    sources = [replace(source, label="forget:bio") for source in config.sources]
    trainer = titan.masked_config(dataloader=replace(config, sources=sources)).build()
    return [weights_of(trainer), *steps(trainer, 2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, str(tmp_path_factory.mktemp("titan")))


@pytest.mark.parametrize("kind", ["plain", "selective", "accumulated", "apart", "replicated"])
def test_two_ranks_update_what_one_process_does(two, kind):
    for facts in two:
        history, _, _ = facts[kind]
        expected = facts["one process"][kind != "apart"][1 if kind == "accumulated" else 2]
        assert differing(history[0], expected[0]) == set()
        for after, ours in zip(history[1:], expected[1:], strict=True):
            for key, piece in after.items():
                assert torch.allclose(piece, ours[key], atol=2e-5), key


@pytest.mark.parametrize("kind", ["plain", "selective", "accumulated", "apart", "narrow", "replicated"])
def test_what_the_labels_freeze_keeps_its_bits(two, kind):
    for facts in two:
        history, states, optimizers = facts[kind]
        assert optimizers == {"SgtmAdamW"}
        assert differing(history[2], history[3]) == OWN  # the last step has bio's tokens alone
        for before, after in zip(states[1], states[2], strict=True):
            assert differing(before, after) == OWN


def test_a_checkpoint_of_torchtitan_resumes_to_the_bit(two):
    for facts in two:
        (counted, straight, states), (again, weights, others) = facts["resumed"]
        assert counted == again and len(set(counted.values())) > 1
        assert differing(straight, weights) == set()
        for ours, theirs in zip(states, others, strict=True):
            assert differing(ours, theirs) == set()


def test_ablation_under_fsdp(two):
    for facts in two:
        full, ablated, whole, wholly_ablated = facts["evaluated"]
        assert torch.equal(full, whole) and torch.equal(ablated, wholly_ablated) and not torch.equal(full, ablated)


def test_the_loader_trains(two):
    for facts in two:
        before, first, second = facts["loaded"]
        assert differing(before, first) == differing(first, second) == OWN
