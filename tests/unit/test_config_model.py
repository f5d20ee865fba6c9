"""The section `model` of a config: what its keys take together, in every family."""

import pytest
from configs import message
from pydantic import ValidationError

from sgtm.config import Config, load_config
from sgtm.config.model import ModelConfig

LLAMA = ["--model.family=llama", "--model.window=null"]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["--model.hidden_size=33"], "hidden_size 33 is not a multiple of heads 4; set head_dim"),
        ([*LLAMA, "--model.kv_heads=3"], "heads 4 is not a multiple of kv_heads 3; kv_heads must divide it"),
        (["--model.kv_heads=2"], "kv_heads 2: family gpt_neo has a KV head for each of heads 4; set kv_heads null, or"),
        (
            ["--model.tie_embeddings=false"],
            "tie_embeddings false: family gpt_neo always ties; set it true, or",
        ),
        (["--model.head_dim=4"], "head_dim 4: family gpt_neo takes hidden_size / heads alone; set head_dim null"),
        ([*LLAMA, "--model.window=8"], "window 8: family llama has none; set window null, or family gpt_neo"),
        ([*LLAMA, "--model.head_bias=true"], "head_bias true: family llama has none; set it false, or family gpt_neo"),
    ],
)
def test_a_shape_that_a_family_does_not_have_is_refused(overrides, rule):
    assert message("debug", *overrides).startswith(f"debug: model: {rule}")


@pytest.mark.parametrize(
    "overrides", [["--model.heads=3", "--model.head_dim=5"], ["--model.kv_heads=2", "--masking.forget_heads=2"]]
)
def test_llama_takes_any_width_of_head_and_fewer_kv_heads(overrides):
    load_config("debug", [*LLAMA, "--masking.strategy=none", *overrides])


def test_a_section_of_a_model_without_a_size_is_refused():
    with pytest.raises(ValidationError, match="vocab_size\n  Field required"):
        ModelConfig(layers=1, hidden_size=8, heads=2, intermediate_size=8, context=8)


MIXTRAL = [*LLAMA[1:], "--model.family=mixtral", "--model.experts=6", "--model.experts_per_token=2"]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["--model.experts_per_token=1"], "experts_per_token 1: family mixtral takes at least 2 and at most experts 6"),
        (["--model.experts_per_token=7"], "experts_per_token 7: family mixtral takes at least 2 and at most experts 6"),
        (["--model.experts=0"], "experts_per_token 2: family mixtral takes at least 2 and at most experts 0"),
        (["--model.window=8"], "window 8: family mixtral has none; set window null, or family gpt_neo"),
        (["--model.head_bias=true"], "head_bias true: family mixtral has none; set it false, or family gpt_neo"),
        (["--model.family=llama"], "experts 6: family llama has no experts; set it 0, or family mixtral"),
        (
            ["--model.family=llama", "--model.experts=0", "--model.experts_per_token=0", "--model.shared_experts=1"],
            "shared_experts 1: family llama has no experts; set it 0, or family mixtral",
        ),
    ],
)
def test_experts_are_of_one_family_and_several_are_chosen(overrides, rule):
    assert message("debug", *MIXTRAL, *NO_NEURONS, *overrides).startswith(f"debug: model: {rule}")


NO_NEURONS = ["--masking.forget_neurons=0"]


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ["--masking.forget_neurons=3"],
            "masking.forget_neurons 3: family mixtral divides whole experts; set it 0, and masking.forget_experts",
        ),
        (
            ["--masking.forget_experts=5"],
            "masking.forget_experts 5 leaves 1 of model.experts 6 to the retain group, below model.experts_per_token 2",
        ),
        (["--masking.forget_experts=6"], "masking.forget_experts: 6 of 6 would be forget, which leaves no retain"),
        (["--masking.forget_experts={es: [6]}"], "masking.forget_experts: indices must be distinct and within 0..5"),
        (
            ["--masking.forget_experts=0", "--masking.forget_heads=0"],
            "masking.forget_heads es: 0, with forget_experts 0, leaves the domain no group",
        ),
        (["--train.compile=blocks"], "train.compile blocks: the experts of family mixtral are not in a graph"),
    ],
)
def test_groups_have_whole_experts(overrides, rule):
    assert rule in message("debug", *MIXTRAL, *NO_NEURONS, *overrides)


def test_experts_of_a_family_without_any_are_refused():
    expected = "masking.forget_experts 2: family gpt_neo has no experts; set it 0, and masking.forget_neurons in its"
    assert expected in message("debug", "--masking.forget_experts=2")


def test_balance_needs_experts():
    expected = "train.expert_balance 0.01: family gpt_neo has no experts to balance; set it 0"
    assert expected in message("debug", "--train.expert_balance=0.01")
    assert "train.expert_balance" in message("debug", *MIXTRAL, *NO_NEURONS, "--train.expert_balance=-1")
    config = load_config("debug", [*MIXTRAL, *NO_NEURONS, "--train.expert_balance=0.01"])
    assert config.train.expert_balance == 0.01 and load_config("debug").train.expert_balance == 0


def test_a_domain_has_one_expert_where_no_count_is_set():
    config = load_config("debug", [*MIXTRAL, *NO_NEURONS])
    size = config.model.intermediate_size
    assert config.masking.forget_experts == 1 and config.partition.layers[0].experts == (5, 1)
    assert config.partition.layers[0].neurons == (5 * size, size)
    values = config.model_dump(exclude={"masking": {"forget_neurons", "forget_experts"}})
    assert Config.model_validate(values).masking.forget_neurons == 0


def test_experts_are_added_to_those_of_the_retain_group():
    added = ["--masking.partition=add", "--masking.forget_experts=2", "--masking.forget_heads=0"]
    config = load_config("debug", [*MIXTRAL, *NO_NEURONS, "--model.shared_experts=1", *added])
    layer, size = config.partition.layers[0], config.model.intermediate_size
    assert (config.model.experts, layer.experts, config.masking.partition) == (8, (6, 2), "added")
    assert layer.neurons == (7 * size, 2 * size) and sum(layer.neurons) == config.model.neurons
