"""Losses and gradients of the method's reference implementation (GPT-Neo, random weights), matched to fp32 rounding.

`gptneo_small.npz` holds, for parameter masking (our `sgtm`) and gradient routing, the loss and every gradient of one
batch trained as unlabeled ("default"), forget or retain. Each case runs through both backends, as a whole batch of
one label and inside a micro-batch that mixes all three: there the gradient is the sum of the pure ones, each weighted
by its tokens.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import partition_of

from sgtm.config.schema import ModelConfig
from sgtm.data.batch import IGNORE
from sgtm.masking.labels import LabelSpace
from sgtm.masking.strategy import build_tables
from sgtm.model.hf import from_hf_state, to_hf_state
from sgtm.model.hf_config import hf_config
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan, merge_runs

GOLDEN = np.load(Path(__file__).parent / "gptneo_small.npz")
META = json.loads(str(GOLDEN["meta"]))
SPACE = LabelSpace(("forget",))
STRATEGY = {"parameter_masking": "sgtm", "gradient_routing": "gradient_routing"}
LABEL = {"default": 0, "retain": 1, "forget": 2}
CASES = [case["name"] for case in META["cases"]]
BACKENDS = ["reference", "runs"]

# fp32 rounding: the golden values themselves carry about this much, relative to the largest entry of each gradient.
RELATIVE = 2e-6


def build_model(backend: str) -> Transformer:
    config = ModelConfig(
        family="gpt_neo",
        layers=META["num_layers"],
        hidden_size=META["hidden_size"],
        heads=META["num_heads"],
        intermediate_size=META["intermediate_size"],
        vocab_size=META["vocab_size"],
        context=META["max_position_embeddings"],
        window=META["window_size"],
        head_bias=True,
    )
    partition = partition_of(
        SPACE,
        config,
        forget_heads=META["num_heads"] - META["retain_heads"],
        forget_neurons=META["intermediate_size"] - META["retain_neurons"],
    )
    model = Transformer(config, partition, backend)
    theirs = {k.removeprefix("param/"): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith("param/")}
    head_bias = theirs.pop("lm_head.bias")  # Hugging Face's own GPT-Neo has no such bias
    shape = {"heads": config.heads, "kv_heads": config.heads, "neurons": config.intermediate_size}
    state = from_hf_state(theirs, hf_config(without_head_bias(config), **shape), partition)
    model.load_state_dict({**state, "head_bias": head_bias})
    return model


def without_head_bias(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"head_bias": False})


def run(backend: str, strategy: str, labels: list[str]):
    """Loss and gradients (Hugging Face names) of the golden batch, once for each label, in one micro-batch."""
    model = build_model(backend)
    ids = torch.from_numpy(GOLDEN["input_ids"]).repeat(len(labels), 1)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    batch, seq_len = ids.shape
    runs = merge_runs([LABEL[label] for label in labels], [batch // len(labels) * seq_len] * len(labels))
    plan = MaskPlan(build_tables(SPACE, STRATEGY[strategy]), runs, batch, seq_len)
    loss, sums = model(ids, targets, plan, 1 / int((targets != IGNORE).sum()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    head_bias = gradients.pop("head_bias")
    theirs, _ = to_hf_state(gradients, without_head_bias(model.config), model.partition)
    return float(loss.detach()), sums, {**theirs, "lm_head.bias": head_bias}


def golden_gradients(case: str) -> dict[str, torch.Tensor]:
    prefix = f"grad/{case}/"
    return {k.removeprefix(prefix): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(prefix)}


def assert_matches(ours: dict, golden: dict) -> None:
    assert set(golden) <= set(ours)
    for name, want in golden.items():
        error = (ours[name] - want).abs().max().item()
        assert error <= RELATIVE * max(want.abs().max().item(), 1e-3), f"{name}: {error:.2e}"
        assert torch.all(ours[name][want == 0] == 0), f"{name}: what the reference masks must be exactly 0"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_whole_batch(case: str, backend: str):
    strategy, label = case.split("/")
    loss, sums, gradients = run(backend, strategy, [label])
    assert loss == pytest.approx(float(GOLDEN[f"loss/{case}"]), rel=1e-6)
    assert float(sums[LABEL[label]]) == pytest.approx(loss * GOLDEN["input_ids"][:, 1:].size, rel=1e-6)
    assert_matches(gradients, golden_gradients(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", list(STRATEGY))
def test_mixed_batch_is_the_token_weighted_sum(strategy: str, backend: str):
    labels = ["forget", "default", "retain"]
    loss, _, gradients = run(backend, strategy, labels)
    cases = [f"{strategy}/{label}" for label in labels]
    assert loss == pytest.approx(sum(float(GOLDEN[f"loss/{case}"]) for case in cases) / 3, rel=1e-6)
    pure = [golden_gradients(case) for case in cases]
    assert_matches(gradients, {name: sum(g[name] for g in pure) / 3 for name in pure[0]})
