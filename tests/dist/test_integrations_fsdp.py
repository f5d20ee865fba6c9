"""Masked Hugging Face models on two ranks under FSDP2: exact freeze and the gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hf_models import differing, masked_model, random_ids
from hf_steps import OPTIONS, OWN, STEPS, STRICT, one_process, pieces_of
from ranks import run_ranks

from sgtm.integrations.families import blocks_of
from sgtm.integrations.hf import SgtmAdamW


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
