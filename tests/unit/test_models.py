"""Presets read without a package for YAML; tests/processes/test_benchmark_steps.py compares them with the configs."""

from sgtm.measure.models import SETTINGS, preset, sections_of

TEXT = """\
# a comment: of the file
model:
  layers: 12  # of which half are local
  norm_eps: 1.0e-5
  window: null
  tie_embeddings: true
  # family: llama
  family: gpt_neo

train:
  precision: bf16  # of the weights
"""


def test_values_are_numbers_booleans_and_words():
    assert sections_of(TEXT) == {
        "model": {"layers": 12, "norm_eps": 1e-5, "window": None, "tie_embeddings": True, "family": "gpt_neo"},
        "train": {"precision": "bf16"},
    }


def test_activations_are_kept_whatever_the_preset_has():
    assert not preset("llama-7b", 1, 1).model.activation_checkpointing


def test_a_step_has_as_many_sequences_as_its_micro_batches():
    assert {name: build().sequences for name, build in SETTINGS.items()} == {
        "124m": 20, "254m": 20, "llama-1b": 4, "tiny": 20, "tiny-llama": 4,
    }  # fmt: skip


def test_the_partition_takes_heads_and_neurons_of_every_layer():
    setting = SETTINGS["tiny-llama"]()
    layers = setting.partition.layers
    assert len(layers) == 2 and {(layer.heads, layer.neurons) for layer in layers} == {((4, 2), (32, 8))}
