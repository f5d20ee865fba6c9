"""Masked Hugging Face models on two ranks under FSDP2: exact freeze and the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hf_models import differing, masked_model, random_ids
from hf_steps import OPTIONS, OWN, STEPS, STRICT, one_process, pieces_of
from ranks import run_ranks
from transformers import Trainer, TrainingArguments, default_data_collator

from sgtm.integrations.families import blocks_of
from sgtm.integrations.hf import SgtmAdamW, SgtmCollator, SgtmTrainerMixin, without_domains

LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def sharded(family: str, seed: int = 0, **policy):
    """Every layer, and what is left, a unit of its own; 10 neurons and 41 tokens are uneven shards of two ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = masked_model(family, seed, **STRICT), init_device_mesh("cpu", (2,))
    for layer in blocks_of(model):
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def whole(model) -> dict:
    return pieces_of(model, {name: p.full_tensor() for name, p in model.named_parameters()})


def moments(model, optimizer) -> list[dict]:
    return [
        pieces_of(model, {n: optimizer.state[p][moment].full_tensor() for n, p in model.named_parameters()})
        for moment in ("exp_avg", "exp_avg_sq")
    ]


def train(model, optimizer, number: int, rows=((0, 1),)) -> None:
    """One step of STEPS; `rows` of its sequences are the micro-batches, of which the last alone is reduced."""
    rank = dist.get_rank()
    ids, labels = random_ids(2, 10 * number + rank), STEPS[number][rank]
    for index, chosen in enumerate(rows):
        if len(rows) > 1:
            model.set_requires_gradient_sync(index == len(rows) - 1)
        part = ids[list(chosen)]
        loss = model(input_ids=part, labels=part, sgtm_labels=[labels[row] for row in chosen]).loss
        (loss * len(chosen) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def under_fsdp(family: str, rows, policy: dict) -> tuple[list[dict], list[list[dict]]]:
    model = sharded(family, **policy)
    optimizer = SgtmAdamW(model, **OPTIONS)
    history, states = [whole(model)], []
    for number in range(len(STEPS)):
        train(model, optimizer, number, rows)
        history.append(whole(model))
        states.append(moments(model, optimizer))
    return history, states


TOGETHER, APART = ((0, 1),), ((0,), (1,))


@pytest.mark.parametrize("rows", [TOGETHER, APART], ids=["plain", "accumulated"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_fsdp_updates_what_one_process_does(family, rows):
    expected = one_process(family)
    for history, states in run_ranks(under_fsdp, 2, family, rows, {}):
        assert differing(history[0], expected[0]) == set()
        for after, ours in zip(history[1:], expected[1:], strict=True):
            for key, piece in after.items():
                assert torch.allclose(piece, ours[key], atol=2e-5), key
        assert differing(history[2], history[3]) == OWN  # the last step has bio's tokens alone
        for before, after in zip(states[1], states[2], strict=True):
            assert differing(before, after) == OWN


def resumed(folder: str, full: bool, broadcast: bool) -> list[tuple[dict, dict, list[dict]]]:
    """Steps counted, weights and moments after three steps: without a pause, and resumed after the first two.

    broadcast  only rank 0 reads the file. With `set_state_dict` torch itself waits for ever: a rank that passes empty
               dicts takes no part in the broadcast of the weights. Its two halves do not.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(full_state_dict=full)
    loading = StateDictOptions(full_state_dict=full, broadcast_from_rank0=broadcast)
    results = []
    for begin in (0, 2):
        model = sharded("gpt2", seed=begin)
        optimizer = SgtmAdamW(model, **OPTIONS)
        if begin and broadcast and dist.get_rank():
            state = {"model": {}, "optimizer": {}}
        elif begin and full:
            state = torch.load(f"{folder}/full", weights_only=True)
        elif begin:
            weights, states = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": states}
            dcp.load(state, checkpoint_id=folder)
        if begin:
            set_model_state_dict(model, state["model"], options=loading)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=loading)
        for number in range(begin, 3):
            train(model, optimizer, number)
            if number == 1:
                weights, states = get_state_dict(model, optimizer, options=options)
                state = {"model": weights, "optimizer": states}
                if not full:
                    dcp.save(state, checkpoint_id=folder)
                elif dist.get_rank() == 0:
                    torch.save(state, f"{folder}/full")
                dist.barrier()
        results.append((dict(optimizer.param_groups[0]["steps"]), whole(model), moments(model, optimizer)))
    return results


KINDS = {"sharded": (False, False), "full": (True, False), "full of rank 0": (True, True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_torch_resumes_to_the_bit(tmp_path, kind):
    ranks = run_ranks(resumed, 2, str(tmp_path), *KINDS[kind], timeout=60)
    for (steps, straight, states), (again, weights, others) in ranks:
        assert steps == again and len(set(steps.values())) > 1
        assert differing(straight, weights) == set()
        for ours, theirs in zip(states, others, strict=True):
            assert differing(ours, theirs) == set()


def in_half_precision() -> tuple[list[dict], list[str]]:
    """Weights before and after a step of bio's tokens alone, reduced in fp32, and dtypes of the gradients."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = sharded("llama", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer, history = SgtmAdamW(model, **OPTIONS), []
    for number in range(len(STEPS)):
        train(model, optimizer, number, APART)
        history.append(whole(model))
    return history[-2:], sorted({str(p.dtype) for p in model.parameters()})


def test_freeze_holds_where_gradients_are_in_half_precision():
    for (before, after), dtypes in run_ranks(in_half_precision, 2):
        assert differing(before, after) == OWN and dtypes == ["torch.float32"]


def refused() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, messages = init_device_mesh("cpu", (2,)), []
    early = masked_model("llama")
    optimizer = SgtmAdamW(early)
    fully_shard(early, mesh=mesh)
    columns = fully_shard(masked_model("llama"), mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    ids = random_ids(1)
    early(input_ids=ids, labels=ids, sgtm_labels=["retain"]).loss.backward()
    old = FullyShardedDataParallel(masked_model("llama"), device_id=torch.device("cpu"), use_orig_params=True)
    parallel = masked_model("llama")
    parallelize_module(parallel.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
    calls = [optimizer.step, *(lambda model=model: SgtmAdamW(model) for model in (columns, old, parallel))]
    for call in (*calls, lambda: without_domains(early, ["bio"])):
        try:
            call()
            messages.append("")
        except (RuntimeError, ValueError) as error:
            messages.append(str(error))
    return messages


def test_what_cannot_be_frozen_is_refused():
    for early, columns, old, parallel, parts in run_ranks(refused, 2):
        assert "build the optimizer after fully_shard" in early
        assert "only shards of rows, Shard(0)" in columns
        assert "FullyShardedDataParallel flattens the parameters" in old
        assert "not of fully_shard: tensor parallelism is not supported" in parallel
        assert "sharded by ZeRO-3 or FSDP2" in parts


class MaskedTrainer(SgtmTrainerMixin, Trainer):
    pass


def shard_on_cpu() -> None:
    """Make Accelerate use FSDP on CPUs, where it silently takes DDP."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def in_a_trainer(folder: str) -> list[dict]:
    """Weights before, after retain data alone, and after bio's alone, each a run of two steps."""
    from datasets import Dataset

    shard_on_cpu()
    model = masked_model("llama", **STRICT)
    history = [pieces_of(model, dict(model.named_parameters()))]
    weights = model.state_dict()
    for label in ("retain", "forget:bio"):
        model = masked_model("llama", **STRICT)  # Accelerate shards a model once
        model.load_state_dict(weights)
        ids = random_ids(8).tolist()
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=0.01, weight_decay=0.1,
            max_grad_norm=1.0, fsdp=True,
            fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": ids, "labels": ids, "sgtm_labels": [label] * 8})
        collator = SgtmCollator(default_data_collator, STRICT)
        trainer = MaskedTrainer(model, arguments, data_collator=collator, train_dataset=data)
        trainer.train()
        history.append(whole(trainer.model))
        weights = {name: parameter.full_tensor() for name, parameter in trainer.model.named_parameters()}
    return history


def test_a_trainer_on_two_ranks_freezes(tmp_path):
    first, second = run_ranks(in_a_trainer, 2, str(tmp_path), env=LAUNCHED, timeout=80)
    for before, after, ours in zip(first, first[1:], second[1:], strict=False):
        assert differing(after, ours) == set() and differing(before, after)
    assert not differing(first[0], first[1]) & OWN and differing(first[1], first[2]) == OWN
