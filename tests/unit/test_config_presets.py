"""Presets and shipped configs: the paper's settings, published sizes, and numbers of ranks that they run on."""

import re
from pathlib import Path

import pytest
import torch

from sgtm.config import Config, load_config, preset_names
from sgtm.data.rules import load_rules
from sgtm.model.transformer import Transformer
from sgtm.sweep.compare import check_comparable
from sgtm.sweep.file import read_sweep

ROOT = Path(__file__).parents[2]


PAPER = {  # layers, hidden size, context, batch, learning rate, steps, share of retain data in retain mode, joint
    "tinystories-8m": (6, 128, 512, 128, 5e-4, 3989, 0.25, "free"),
    "tinystories-18m": (6, 256, 512, 128, 5e-4, 9204, 0.25, "free"),
    "tinystories-34m": (8, 384, 512, 128, 5e-4, 17484, 0.25, "free"),
    "tinystories-64m": (12, 512, 512, 128, 5e-4, 33120, 0.25, "free"),
    "wikipedia-34m": (8, 384, 1024, 128, 6e-4, 5169, 0.10, "masked"),
    "wikipedia-64m": (12, 512, 1024, 256, 6e-4, 4887, 0.10, "masked"),
    "wikipedia-125m": (12, 768, 1024, 256, 6e-4, 9491, 0.10, "masked"),
    "wikipedia-254m": (16, 1024, 1024, 512, 6e-4, 9689, 0.10, "masked"),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_have_the_papers_settings(name):
    c = load_config(name)
    share = c.data.channel["retain"]["retain"]
    shape = (c.model.layers, c.model.hidden_size, c.model.context, c.sequences_per_step)
    assert (*shape, c.optimizer.lr, c.train.steps, share, c.masking.joint or "free") == PAPER[name]
    assert (c.model.vocab_size, c.model.heads, c.model.window) == (50257, 32, 256)
    assert c.model.intermediate_size == 4 * c.model.hidden_size
    assert (c.masking.forget_heads, c.masking.forget_neurons, c.data.mixing) == (1, 64, "step")
    assert (c.optimizer.betas, c.optimizer.weight_decay, c.train.precision) == ((0.9, 0.95), 0.1, "bf16")


WARM_UP = {"debug": 2, "gpt2-124m": 700, "llama-7b": 2000, "quickstart": 50}  # steps; the others: 1000


@pytest.mark.parametrize("name", preset_names())
def test_the_warm_up_of_a_preset_follows_the_length_of_the_run(name):
    config = load_config(name)
    assert config.optimizer.warmup(config.train.steps) == WARM_UP.get(name, 1000)
    for steps in (1, 30, 1_000_000):
        short = load_config(name, [f"--train.steps={steps}"])
        expected = steps * WARM_UP.get(name, 1000) / config.train.steps
        assert short.optimizer.warmup(steps) == pytest.approx(expected, rel=0.01, abs=0.51)


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config.model, config.partition, "reference").parameters())


@pytest.mark.parametrize("name", preset_names())
def test_preset_parses_runs_on_one_process_and_has_the_size_in_its_name(name):
    config = load_config(name)
    assert config.name == name
    assert config.accumulation(1) >= 1
    config = load_config(name, ["--masking.strategy=none"])  # without a domain's own embedding
    size = re.search(r"-(\d+)([mb])$", name)
    if size and name != "llama-1b":  # 5 %: the names round (the paper's 8M model has 7.69M)
        assert parameters(config) == pytest.approx(int(size[1]) * {"m": 1e6, "b": 1e9}[size[2]], rel=0.05)


@pytest.mark.parametrize("name", sorted({*preset_names(), "novels"} - {"debug"}))
@pytest.mark.parametrize("ranks", [1, 2, 8, 32])
def test_shipped_examples_run_on_these_ranks(name, ranks):
    """On as many as there are sequences in a step, with a micro-batch that divides its share of them."""
    source = ROOT / "launch" / "recipes" / "novels.yaml" if name == "novels" else name
    config = load_config(source)
    size = config.for_ranks(ranks).train.micro_batch
    assert config.accumulation(ranks) * size * ranks == config.sequences_per_step
    assert size * config.model.context <= 16_384
    if config.train.micro_batch is None:  # the most that do
        larger = range(size + 1, 16_384 // config.model.context + 1)
        assert not any(config.sequences_per_step % (n * ranks) == 0 for n in larger)


def test_published_models_have_their_exact_size():
    """Llama 3.2 1B and Llama 7B as published; GPT-2 small less the biases of Wq, Wk, Wv, which GPT-Neo has not."""
    unmasked = ["--masking.strategy=none"]
    assert parameters(load_config("llama-1b", unmasked)) == 1_235_814_400
    assert parameters(load_config("llama-7b", unmasked)) == 6_738_415_616
    assert parameters(load_config("gpt2-124m", unmasked)) == 124_439_808 - 12 * 3 * 768
    assert parameters(load_config("llama-1b")) == 1_235_814_400 + 128_256 * 2048  # and a domain's own embedding


def test_recipes_parse():
    """Every YAML in launch/recipes: configs, and the rule files and sweeps that lie beside them. Runs of a sweep can be
    compared, as far as that takes no corpus."""
    for path in sorted((ROOT / "launch" / "recipes").glob("*.yaml")):
        if path.name.endswith(".rules.yaml"):
            assert load_rules(path).labels
        elif path.name.endswith(".sweep.yaml"):
            sweep = read_sweep(path)
            check_comparable(sweep, {run.name: None for run in sweep.runs})
        else:
            assert load_config(str(path)).accumulation(1) >= 1
