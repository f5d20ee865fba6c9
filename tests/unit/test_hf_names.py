"""sgtm/hf/names.py: every parameter of a family has its place, once."""

import pytest
import torch
from families import partition_of
from transformers import AutoModelForCausalLM

from sgtm.config.schema import ModelConfig
from sgtm.hf.names import HEAD, NAMES
from sgtm.hf.weights import Conversion
from sgtm.masking.labels import LabelSpace
from sgtm.model.transformer import Transformer

SHAPE = {"layers": 1, "hidden_size": 16, "heads": 4, "intermediate_size": 8, "vocab_size": 11, "context": 6}


@pytest.mark.parametrize("family", NAMES)
def test_they_are_the_parameters_of_both_models(family):
    config = ModelConfig(family=family, tie_embeddings=family == "gpt_neo", **SHAPE)
    partition = partition_of(LabelSpace(("bio",)), config, forget_heads=1, forget_neurons=2)
    names = NAMES[family]
    with torch.device("meta"):
        ours = Transformer(config, partition, "torch")
        theirs = AutoModelForCausalLM.from_config(Conversion(config, partition).config)
    mine = [*names.outer, *(f"blocks.0.{weight.ours}" for weight in names.weights)]
    named = [*names.outer.values(), *(names.block.format(0) + name for w in names.weights for name in w.theirs)]
    assert sorted(mine + ["head"] * (family == "llama")) == sorted(name for name, _ in ours.named_parameters())
    parameters = {name for name, _ in theirs.named_parameters()} | ({HEAD} if family == "llama" else set())
    assert sorted(named + [HEAD] * (family == "llama")) == sorted(parameters)
