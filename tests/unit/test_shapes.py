"""Parameters and FLOPs from a config: against the model, and by hand."""

import pytest
import torch

from sgtm.config import load_config, preset_names
from sgtm.estimate.shapes import model_flops, parameter_shapes, recomputed_flops
from sgtm.model.transformer import Transformer

UNUSUAL = ("--model.head_bias=true", "--masking.masked_layers=[1]")
EXPERTS = (
    "--model.family=mixtral", "--model.window=null", "--model.experts=6", "--model.experts_per_token=2",
    "--model.shared_experts=1", "--masking.forget_neurons=0",
)  # fmt: skip
OWN = [
    ("debug", EXPERTS),
    ("debug", ("--masking.domain_embedding=full",)),
    ("llama-1b", ("--masking.domain_embedding=64",)),
]


@pytest.mark.parametrize(("name", "options"), [*((name, ()) for name in preset_names()), ("debug", UNUSUAL), *OWN])
def test_parameters_are_those_of_the_model(name, options):
    config = load_config(name, list(options))
    with torch.device("meta"):
        model = Transformer(config.model, config.partition)
    real = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(parameter_shapes(config).items()) == real


def test_flops_of_a_token_by_hand():
    """debug: 2 layers of width 32, 4 heads of 8, 64 neurons, vocabulary 512; 64 keys in one layer, 16 in the other."""
    config = load_config("debug")
    looked_up = 64 * 32
    assert model_flops(config.model) == 6 * (35_392 - looked_up) + 12 * (64 + 16) * 32
    assert recomputed_flops(config.model) == 0
    again = load_config("debug", ["--model.activation_checkpointing=true"])
    assert recomputed_flops(again.model) == 2 * (35_392 - looked_up - 512 * 32) + 4 * (64 + 16) * 32


def test_flops_of_experts_are_of_those_that_a_token_runs_through():
    """3 of 7 experts of 64 neurons, gates and ups beside outputs, in 2 layers of width 32; a router of 6 rows."""
    model = load_config("debug", list(EXPERTS)).model
    attention, norms = 2 * 4 * 32 * 32, 5 * 32
    multiplied = 512 * 32 + attention + norms + 2 * (3 * 3 * 64 * 32 + 6 * 32)
    assert model_flops(model) == 6 * multiplied + 12 * 2 * 64 * 32
    assert model.neurons == 7 * 64 and model.experts_run == 3


def test_an_embedding_that_is_no_head_is_looked_up():
    """Llama's, of 2,048 columns: it multiplies nothing."""
    config = load_config("llama-1b", ["--model.vocab_size=128", "--model.tie_embeddings=false"])
    fewer = load_config("llama-1b", ["--model.vocab_size=64", "--model.tie_embeddings=false"])
    assert model_flops(config.model) - model_flops(fewer.model) == 6 * 64 * config.model.hidden_size
