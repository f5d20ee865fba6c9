"""sgtm/hf/experts.py: which models with experts cross over, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import partition_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteMoeSharedConfig, MixtralConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.config import model_config_from_hf, why_architecture
from sgtm.hf.experts import folder_state
from sgtm.hf.weights import Conversion, to_hf_state
from sgtm.masking.labels import LabelSpace
from sgtm.model.transformer import Transformer

SPACE = LabelSpace(("bio",))
MIXTRAL = ModelConfig(
    family="mixtral", layers=2, hidden_size=24, heads=6, kv_heads=3, intermediate_size=10, experts=6,
    experts_per_token=2, vocab_size=31, context=8,
)  # fmt: skip
SHARED = MIXTRAL.model_copy(update={"shared_experts": 2})
MASKING = {"forget_heads": 2, "forget_neurons": 0, "forget_experts": {"bio": [1, 4]}}
by_config = pytest.mark.parametrize("config", [MIXTRAL, SHARED], ids=["mixtral", "shared"])


def state_of(config: ModelConfig):
    partition = partition_of(SPACE, config, **MASKING)
    torch.manual_seed(0)
    model = Transformer(config, partition)
    return model.state_dict(), partition


@by_config
def test_experts_of_a_removed_domain_are_gone(config):
    """The four that are left are the original 0, 2, 3 and 5; removed heads are zeroed in Granite MoE."""
    state, partition = state_of(config)
    full, _ = to_hf_state(state, config, partition)
    left, shape = to_hf_state(state, config, partition, ["bio"])
    assert shape.num_local_experts == 4 and shape.num_experts_per_tok == 2
    assert shape.num_attention_heads == (6 if config.shared_experts else 4)
    moe, originals = "model.layers.1.block_sparse_moe.", [0, 2, 3, 5]
    if config.shared_experts:
        for matrix in ("input_linear", "output_linear"):
            assert torch.equal(left[f"{moe}{matrix}.weight"], full[f"{moe}{matrix}.weight"][originals])
    else:
        for number, original in enumerate(originals):
            name = f"{moe}experts.{{}}.w1.weight"
            assert torch.equal(left[name.format(number)], full[name.format(original)])
    router = f"{moe}{'router.layer' if config.shared_experts else 'gate'}.weight"
    assert torch.equal(left[router], full[router][originals])
    numel = sum(tensor.numel() for key, tensor in left.items() if key != "lm_head.weight")
    attention, shared = 0 if config.shared_experts else 2, config.shared_experts
    by_hand = 31 * 24 + 24 + 2 * (2 * 24 + 4 * 24 + 3 * 10 * 24 * (4 + shared))
    by_hand += 2 * (2 * (6 - attention) * 4 * 24 + 2 * (3 - attention // 2) * 4 * 24)
    assert numel == by_hand


@by_config
def test_a_folder_of_transformers_has_these_names(tmp_path: Path, config):
    state, partition = state_of(config)
    exported, shape = to_hf_state(state, config, partition)
    model = AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path)
    folder = load_file(tmp_path / "model.safetensors")
    assert exported.keys() - {"lm_head.weight"} == folder.keys()
    apart = folder_state(model.state_dict(), shape.model_type)
    assert all(torch.equal(folder[name], apart[name]) for name in folder)
    assert (why_architecture(config, shape) is None) == (not config.shared_experts)


def test_other_models_stay_as_they_are():
    state = {"model.layers.0.mlp.gate_proj.weight": torch.ones(2)}
    assert folder_state(state, "llama") == state


def test_the_gates_of_shared_experts_come_before_their_ups():
    state, partition = state_of(SHARED)
    exported, _ = to_hf_state(state, SHARED, partition)
    gates, ups = state["blocks.0.mlp.w_in"][:40].unflatten(0, (2, 2, 10)).transpose(0, 1).flatten(1, 2)
    assert torch.equal(exported["model.layers.0.shared_mlp.input_linear.weight"], torch.cat((gates, ups)))
    down = exported["model.layers.0.shared_mlp.output_linear.weight"]
    assert torch.equal(down.t(), state["blocks.0.mlp.w_out"][:20])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"embedding_multiplier": 12}, "embedding_multiplier is 12, only 1 can"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22, only 1 can"),
        ({"logits_scaling": 6}, "logits_scaling is 6, only 1 can"),
        ({"attention_multiplier": 1.0}, "attention_multiplier is 1.0, only 0.5 can"),
        ({"shared_intermediate_size": 15}, "shared_intermediate_size is 15, only a multiple of .* 10"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size is 0, only a multiple of .* 10"),
        ({"attention_bias": True}, "attention_bias is True, only false"),
        ({"num_experts_per_tok": 1}, "experts_per_token 1: family mixtral takes at least 2"),
    ],
)
def test_what_ours_does_not_compute_is_refused(keys, message):
    _, partition = state_of(SHARED)
    shape = Conversion(SHARED, partition).config
    assert model_config_from_hf(shape) == SHARED.model_copy(update={"kv_heads": 3})
    with pytest.raises(ValueError, match=message):
        model_config_from_hf(GraniteMoeSharedConfig(**(shape.to_dict() | keys)))


def test_a_mixtral_with_a_window_is_refused():
    shape = Conversion(MIXTRAL, partition_of(SPACE, MIXTRAL, **MASKING)).config
    with pytest.raises(ValueError, match="mixtral config: sliding_window is 4, only null"):
        model_config_from_hf(MixtralConfig(**(shape.to_dict() | {"sliding_window": 4})))


@by_config
def test_experts_cannot_be_zeroed(config):
    """A router that gives an expert of zeros the logit 0 still chooses it."""
    partition = partition_of(SPACE, config, **MASKING)
    with pytest.raises(ValueError, match="router would still choose them, but nothing is pruned; leave out --zeroed"):
        Conversion(config, partition, ["bio"], prune=False)
    some = partition_of(SPACE, config, **MASKING, masked_layers=[1])
    with pytest.raises(ValueError, match="masked_layers leaves layers with different numbers; train with groups"):
        Conversion(config, some, ["bio"])
    Conversion(config, some), Conversion(config, partition, prune=False)
    heads_alone = partition_of(SPACE, config, **MASKING | {"forget_experts": 0})
    assert Conversion(config, heads_alone, ["bio"], prune=False).config.num_local_experts == 6


def test_heads_that_granite_moe_does_not_have_are_refused():
    config = SHARED.model_copy(update={"head_dim": 6})
    with pytest.raises(ValueError, match=r"6 heads of 6 are not hidden_size 24; train without shared experts, or with"):
        Conversion(config, partition_of(SPACE, config, **MASKING))
