"""Low-rank adapters: the matrices that they make, what they begin as, how many numbers they have, and what learns."""

from __future__ import annotations

import pytest
import torch
from texts import CONFIG, FORGOTTEN
from tiny import tiny_config, tiny_model

from sgtm.config.schema import Config
from sgtm.model.adapters import Adapter, attach, merged, new_adapters, parameter_count, with_adapters
from sgtm.unlearning.text import mean_loss

KINDS = {
    "gpt_neo": CONFIG,
    "llama": tiny_config(
        model={"family": "llama", "tie_embeddings": False, "hidden_size": 8, "heads": 4, "kv_heads": 2, "window": None},
        masking={"forget_heads": 2},
    ),
    "low-rank embedding": tiny_config(masking={"domain_embedding": 2}),
    "full embedding": tiny_config(masking={"domain_embedding": "full"}),
    "checkpointing": tiny_config(model={"activation_checkpointing": True}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def config(request) -> Config:
    return request.param


def moved(config: Config, rank: int = 2) -> dict[str, Adapter]:
    """Adapters of which no number is 0."""
    adapters, generator = new_adapters(tiny_model(config).state_dict(), rank, 1), torch.Generator().manual_seed(5)
    return {name: Adapter(a, torch.randn(b.shape, generator=generator) * 0.1) for name, (a, b) in adapters.items()}


def test_a_matrix_maps_as_it_and_its_adapter_together():
    """W x + scale * B (A x): the in-side as it is stored, the out-side transposed."""
    state, adapters = tiny_model(CONFIG).state_dict(), moved(CONFIG)
    for name, inputs in (("attention.w_qkv", 9), ("mlp.w_in", 9), ("attention.w_o", 9), ("mlp.w_out", 11)):
        name, x = f"blocks.1.{name}", torch.randn(5, inputs)
        weight, (a, b) = state[name], adapters[f"{name}"]
        own, with_adapter = (
            x @ (w if name.endswith("_o") or name.endswith("_out") else w.t())
            for w in (weight, merged(name, weight, adapters[name], 3.0))
        )
        expected = own + 3.0 * torch.stack([b @ (a @ row) for row in x])
        torch.testing.assert_close(with_adapter, expected, rtol=1e-4, atol=1e-5)


def test_with_b_at_zero_the_logits_are_the_bases_bit_for_bit(config):
    base, model = tiny_model(config), tiny_model(config)
    attach(model, new_adapters(base.state_dict(), 2, 0), 16.0)
    with torch.no_grad():
        before, after = (m.logits(FORGOTTEN.input_ids, FORGOTTEN.plan) for m in (base, model))
    assert torch.equal(before, after)


def test_the_attached_model_computes_what_the_merged_weights_do(config):
    base, model, adapters = tiny_model(config), tiny_model(config), moved(config)
    attach(model, adapters, 1.5)
    with torch.no_grad():
        before = base.logits(FORGOTTEN.input_ids, FORGOTTEN.plan)
        base.load_state_dict(with_adapters(base.state_dict(), adapters, 1.5))
        after, attached = (m.logits(FORGOTTEN.input_ids, FORGOTTEN.plan) for m in (base, model))
    assert torch.equal(after, attached) and not torch.allclose(before, after, atol=1e-3)


def test_a_and_b_alone_learn_and_all_of_them(config):
    model = tiny_model(config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = attach(model, moved(config), 1.0)
    tensors = [tensor for adapter in learning.values() for tensor in adapter]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(tensor) for tensor in tensors} == {id(parameter) for parameter in parameters}
    mean_loss(model, FORGOTTEN).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in tensors)
    torch.optim.SGD(parameters, 1.0).step()
    stored = {
        name.replace("parametrizations.", "").removesuffix(".original"): t for name, t in model.state_dict().items()
    }
    assert all(torch.equal(stored[name], tensor) for name, tensor in base.items())


def test_gradients_are_those_of_the_product():
    """dA = scale * B^T dW and dB = scale * dW A^T, dW the gradient on the merged matrix."""
    base, model, adapters = tiny_model(CONFIG), tiny_model(CONFIG), moved(CONFIG)
    learning = attach(model, adapters, 2.0)
    mean_loss(model, FORGOTTEN).backward()
    base.load_state_dict(with_adapters(base.state_dict(), adapters, 2.0))
    mean_loss(base, FORGOTTEN).backward()
    for name, (a, b) in adapters.items():
        gradient = base.get_parameter(name).grad
        gradient = gradient if name.endswith(("w_qkv", "w_in")) else gradient.t()
        torch.testing.assert_close(learning[name].a.grad, 2.0 * b.t() @ gradient, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(learning[name].b.grad, 2.0 * gradient @ a.t(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        # w_qkv 27 x 9, w_o 9 x 9, w_in 11 x 9, w_out 9 x 11; four layers, rank 2
        ("gpt_neo", 4 * 2 * (27 + 9 + 9 + 9 + 11 + 9 + 9 + 11)),
        # 4 query heads and 2 x 2 of keys and values, of size 2; gate and up in one; two layers
        ("llama", 2 * 2 * (16 + 8 + 8 + 8 + 22 + 8 + 8 + 11)),
    ],
)
def test_the_number_of_parameters_by_hand(kind, count):
    assert parameter_count(new_adapters(tiny_model(KINDS[kind]).state_dict(), 2, 0)) == count


def test_a_is_normal_of_the_seed_and_b_is_zero():
    state = {"blocks.0.mlp.w_out": torch.empty(400, 300), "blocks.0.mlp.b_out": torch.empty(300)}
    one, again, other = (new_adapters(state, 64, seed)["blocks.0.mlp.w_out"] for seed in (0, 0, 1))
    assert torch.equal(one.a, again.a) and not torch.equal(one.a, other.a)
    assert one.a.shape == (64, 400) and one.b.shape == (300, 64) and not one.b.any()
    assert float(one.a.std()) == pytest.approx(400**-0.5, rel=0.02) and abs(float(one.a.mean())) < 2e-3


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_that_a_matrix_cannot_have_is_refused(rank):
    message = rf"rank {rank}: an adapter of blocks\.0\.attention\.w_qkv, 27 outputs by 9 inputs, has a rank from 1 to 9"
    with pytest.raises(ValueError, match=message):
        new_adapters(tiny_model(CONFIG).state_dict(), rank, 0)


def test_adapters_of_another_model_are_refused():
    state = tiny_model(CONFIG).state_dict()
    fewer = {name: adapter for name, adapter in moved(CONFIG).items() if "blocks.1" not in name}
    for adapters in (fewer, moved(KINDS["llama"])):
        with pytest.raises(ValueError, match="the adapters are not those of this model"):
            with_adapters(state, adapters, 1.0)
