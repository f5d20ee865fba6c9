"""AdamW with exact freeze for masked Hugging Face models: sgtm/integrations/optimizer.py."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_models import CONFIGS, MIXED, by_key, differing, masked_model, plain_model
from hf_models import random_ids as ids_of

from sgtm.integrations.hf import SgtmAdamW

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
BIO, RETAIN, CODE = (["forget:bio"] * 3, ["retain"] * 3, ["forget:code"] * 3)


def optimizer_of(model):
    return SgtmAdamW(model, **OPTIONS)


def micro_batch(model, labels, seed: int = 0) -> None:
    ids = ids_of(len(labels), seed)
    model(input_ids=ids, labels=ids, sgtm_labels=labels).loss.backward()


def step(model, optimizer, *batches, seed: int = 0) -> None:
    for index, labels in enumerate(batches):
        micro_batch(model, labels, seed + 10 * index)
    optimizer.step()
    optimizer.zero_grad()


def state(model, optimizer) -> dict:
    """Weights and both moments by piece."""
    tensors = {"weight": {name: p.detach() for name, p in model.named_parameters()}}
    for moment in ("exp_avg", "exp_avg_sq"):
        tensors[moment] = {
            name: optimizer.state[p].get(moment, torch.zeros_like(p)) for name, p in model.named_parameters()
        }
    return {
        (key[0], part, *key[1:]): piece.clone()
        for part, of_part in tensors.items()
        for key, piece in by_key(model, of_part).items()
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_where_everything_is_live_it_is_adamw(family):
    model, plain = masked_model(family), plain_model(family)
    ours, theirs = optimizer_of(model), torch.optim.AdamW(plain.parameters(), fused=True, **OPTIONS)
    for index in range(3):
        micro_batch(model, [0] * 3, index)
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("joint", ["free", "masked", "strict"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_no_token_may_update_keeps_every_bit(family, joint):
    model = masked_model(family, joint=joint)
    optimizer = optimizer_of(model)
    step(model, optimizer, MIXED)  # momentum everywhere
    before = state(model, optimizer)
    step(model, optimizer, BIO, BIO)
    moved = differing(before, state(model, optimizer))
    own = {f"{projection}.bio" for projection in ("attn_in", "attn_out", "mlp_in", "mlp_out")}
    assert own <= moved and (moved == own) == (joint == "strict")
    assert not {key for key in moved if key.endswith((".retain", ".code", "_bias"))}
    if joint == "masked":
        assert not moved & {"norm", "embedding", "position", "head", "embedding+head"}
    before = state(model, optimizer)
    step(model, optimizer, RETAIN, CODE)
    assert not {key for key in differing(before, state(model, optimizer)) if key.endswith(".bio")}


def test_a_tied_matrix_is_live_where_one_of_its_kinds_is():
    model = masked_model("qwen2", joint=["embedding"])
    optimizer = optimizer_of(model)
    before = state(model, optimizer)
    step(model, optimizer, BIO)
    assert "embedding+head" in differing(before, state(model, optimizer))
    model = masked_model("qwen2", joint=["embedding", "head"])
    optimizer = optimizer_of(model)
    before = state(model, optimizer)
    step(model, optimizer, BIO)
    assert "embedding+head" not in differing(before, state(model, optimizer))


def test_a_key_has_a_step_count_of_its_own():
    model = masked_model("llama", joint="strict")
    optimizer = optimizer_of(model)
    for index in range(3):
        step(model, optimizer, RETAIN, seed=index)
    fresh = copy.deepcopy(model)
    other = optimizer_of(fresh)
    step(model, optimizer, BIO)
    step(fresh, other, BIO)
    assert differing(state(model, optimizer), state(fresh, other)) <= {
        key for key in optimizer.param_groups[0]["steps"] if not key.endswith(".bio")
    }
    assert optimizer.param_groups[0]["steps"]["mlp_in.bio"] == 1
    assert optimizer.param_groups[0]["steps"]["mlp_in.retain"] == 3


def test_a_loaded_state_continues_to_the_bit(tmp_path):
    model = masked_model("gpt2")
    optimizer = optimizer_of(model)
    step(model, optimizer, MIXED)
    step(model, optimizer, BIO)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state")
    other = masked_model("gpt2", seed=1)
    resumed = optimizer_of(other)
    weights, states = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(states)
    for x, y in ((model, optimizer), (other, resumed)):
        step(x, y, RETAIN)
        step(x, y, BIO)
    assert differing(state(model, optimizer), state(other, resumed)) == set()
    assert optimizer.param_groups[0]["steps"] == resumed.param_groups[0]["steps"]


def test_a_step_without_labels_is_an_error():
    model = masked_model("llama")
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="no forward pass since the last step had sgtm_labels"):
        optimizer.step()
    step(model, optimizer, BIO)
    model.eval()
    ids = ids_of()
    model(input_ids=ids, labels=ids).loss.backward()  # unmasked gradients
    with pytest.raises(ValueError, match="no forward pass since the last step had sgtm_labels"):
        optimizer.step()
    micro_batch(model, BIO)
    optimizer.step()
    with pytest.raises(ValueError, match="no forward pass since the last step had sgtm_labels"):
        optimizer.step()


def test_labels_of_a_step_that_was_left_out_do_not_count():
    model = masked_model("llama")
    optimizer = optimizer_of(model)
    micro_batch(model, RETAIN)
    optimizer.zero_grad()
    before = state(model, optimizer)
    step(model, optimizer, BIO)
    assert "mlp_in.retain" not in differing(before, state(model, optimizer))
    with torch.no_grad():
        model(input_ids=ids_of(3), sgtm_labels=RETAIN)
    step(model, optimizer, BIO)
    assert "mlp_in.retain" not in differing(before, state(model, optimizer))


def test_other_parameters_are_refused():
    model = masked_model("llama")
    with pytest.raises(ValueError, match="not the model's"):
        SgtmAdamW(model, [torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="is not masked"):
        SgtmAdamW(plain_model("llama"))


def test_frozen_parameters_are_left_out():
    model = masked_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = optimizer_of(model)
    before = state(model, optimizer)
    step(model, optimizer, MIXED)
    assert "embedding" not in differing(before, state(model, optimizer))
