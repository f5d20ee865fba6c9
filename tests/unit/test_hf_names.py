"""sgtm/hf/names.py: every parameter of a family has its place, once."""

import pytest
import torch
from families import partition_of
from transformers import AutoModelForCausalLM

from sgtm.config.schema import ModelConfig
from sgtm.hf.experts import folder_state
from sgtm.hf.names import HEAD, NAMES, names_of
from sgtm.hf.weights import Conversion
from sgtm.masking.labels import LabelSpace
from sgtm.model.transformer import Transformer

SHAPE = {"layers": 1, "hidden_size": 16, "heads": 4, "intermediate_size": 8, "vocab_size": 11, "context": 6}


@pytest.mark.parametrize("family", NAMES)
def test_they_are_the_parameters_of_both_models(family):
    experts = {
        "family": "mixtral",
        "experts": 3,
        "experts_per_token": 2,
        "shared_experts": int(family == "granitemoeshared"),
    }
    kind = experts if family in ("mixtral", "granitemoeshared") else {"family": family}
    config = ModelConfig(**kind, tie_embeddings=family == "gpt_neo", **SHAPE)
    partition = partition_of(LabelSpace(("bio",)), config, forget_heads=1, forget_neurons=2, forget_experts=1)
    names = NAMES[family]
    with torch.device("meta"):
        ours = Transformer(config, partition, "torch")
        theirs = AutoModelForCausalLM.from_config(Conversion(config, partition).config)
    mine = [*names.outer, *(f"blocks.0.{weight.ours}" for weight in names.weights)]
    inside = [(name, range(3 if w.each_expert else 1)) for w in names.weights for name in w.theirs]
    theirs_by_weight = [name.format(expert) for name, experts in inside for expert in experts]
    shared = [weight.shared for weight in names.weights if weight.shared]
    named = [*names.outer.values(), *(names.block.format(0) + name for name in theirs_by_weight + shared)]
    untied = not config.tie_embeddings
    assert sorted(mine + ["head"] * untied) == sorted(name for name, _ in ours.named_parameters())
    assert names == names_of(config.family, config.shared_experts)
    stored = set(folder_state(theirs.state_dict(), theirs.config.model_type)) - (set() if untied else {HEAD})
    assert sorted(named + [HEAD] * untied) == sorted(stored)
