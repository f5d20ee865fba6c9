"""Losses and gradients of the method's reference implementation (GPT-Neo, random weights), matched to fp32 rounding.

`gptneo_small.npz` holds, for parameter masking (our `sgtm`) and gradient routing, the loss and every gradient of one
batch trained as unlabeled ("default"), forget or retain. Each case runs through both backends, as a whole batch of
one label and inside a micro-batch that mixes all three: there the gradient is the sum of the pure ones, each weighted
by its tokens.

The golden values are of `joint: free`. A kind in a joint list makes the gradient of its parameters exactly 0 on forget
tokens and leaves all others as they are, since no gradient flows back through a weight's own. The tied matrix has both
kinds; the head's part of its gradient is known where a token is not in the batch. `no_mlp_out` and its like differ from
parameter masking only in weights which then get the gradient of unlabeled tokens. Activation masking has another
forward pass, so nothing here says what its gradients are.
"""

import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from families import partition_of

from sgtm.config.schema import ModelConfig
from sgtm.data.batch import IGNORE
from sgtm.hf.config import hf_config
from sgtm.hf.weights import from_hf_state, to_hf_state
from sgtm.masking.labels import LabelSpace
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import JOINT_KINDS, MaskPlan, merge_label_runs

GOLDEN = np.load(Path(__file__).parent / "gptneo_small.npz")
META = json.loads(str(GOLDEN["meta"]))
SPACE = LabelSpace(("forget",))
STRATEGY = {"parameter_masking": "sgtm", "gradient_routing": "gradient_routing"}
LABEL = {"default": 0, "retain": 1, "forget": 2}
CASES = [case["name"] for case in META["cases"]]
BACKENDS = ["reference", "torch"]

NAMED = ("free", "masked", "strict")
JOINT = {  # the kinds that forget tokens leave alone; what has no name of its own is given as a list
    "free": [],
    "masked": ["embedding", "position", "head", "norm"],
    "strict": [*JOINT_KINDS],
    "listed": ["embedding", "position", "head"],
    "embedding": ["embedding"],
    "head": ["head"],
}
# What forget tokens update besides the golden strategy's, as unlabeled ones do: its weights and its output bias.
VARIANTS = {
    "parameter_masking": ("parameter_masking",),
    "no_mlp_out": ("parameter_masking", "*.mlp.c_proj.*"),
    "no_attn_out": ("parameter_masking", "*.out_proj.*"),
    "no_out": ("parameter_masking", "*.mlp.c_proj.*", "*.out_proj.*"),
    "gradient_routing": ("gradient_routing",),
}
KINDS_OF = {
    "transformer.wte.weight": {"embedding", "head"},
    "transformer.wpe.weight": {"position"},
    "*.ln_[12].*": {"norm"},
    "transformer.ln_f.*": {"final_norm"},
    "*.out_proj.bias": {"attn_out_bias"},
    "*.c_proj.bias": {"mlp_out_bias"},
    "lm_head.bias": {"head_bias"},
}
TIED = "transformer.wte.weight"

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


def run(backend: str, strategy: str, labels: list[str], joint: str = "free"):
    """Loss and gradients (Hugging Face names) of the golden batch, once for each label, in one micro-batch."""
    model = build_model(backend)
    ids = torch.from_numpy(GOLDEN["input_ids"]).repeat(len(labels), 1)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    batch, seq_len = ids.shape
    runs = merge_label_runs([LABEL[label] for label in labels], [batch // len(labels) * seq_len] * len(labels))
    joint = joint if joint in NAMED else JOINT[joint]
    plan = MaskPlan(build_tables(SPACE, STRATEGY.get(strategy, strategy), joint), runs, batch, seq_len)
    loss, sums = model(ids, targets, plan, 1 / int((targets != IGNORE).sum()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    head_bias = gradients.pop("head_bias")
    theirs, _ = to_hf_state(gradients, without_head_bias(model.config), model.partition)
    return float(loss.detach()), sums, {**theirs, "lm_head.bias": head_bias}


def golden_gradients(case: str) -> dict[str, torch.Tensor]:
    prefix = f"grad/{case}/"
    return {k.removeprefix(prefix): torch.from_numpy(GOLDEN[k]) for k in GOLDEN.files if k.startswith(prefix)}


def expected_gradients(strategy: str, label: str, joint: str) -> dict[str, torch.Tensor]:
    """Those of the golden file, changed on forget tokens where the variant and the joint list say so."""
    case, *exempt = VARIANTS[strategy]
    golden = golden_gradients(f"{case}/{label}")
    if label != "forget":
        return golden
    unmasked = golden_gradients(f"{case}/default")
    for name in golden:
        if any(fnmatch(name, pattern) for pattern in exempt):
            golden[name] = unmasked[name]
        if masked_by(joint, name):
            golden[name] = torch.zeros_like(golden[name])
    return golden


def masked_by(joint: str, name: str) -> bool:
    """Whether every kind of this parameter is in the list."""
    return any(fnmatch(name, pattern) and kinds <= {*JOINT[joint]} for pattern, kinds in KINDS_OF.items())


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joint", [*NAMED, "listed"])
@pytest.mark.parametrize("strategy", VARIANTS)
def test_joint_lists(strategy: str, joint: str, backend: str):
    expected = {label: expected_gradients(strategy, label, joint) for label in LABEL}
    loss, _, gradients = run(backend, strategy, ["forget"], joint)
    assert loss == pytest.approx(float(GOLDEN[f"loss/{VARIANTS[strategy][0]}/forget"]), rel=1e-6)
    assert_matches(gradients, expected["forget"])
    gradients = run(backend, strategy, ["forget", "default", "retain"], joint)[2]
    assert_matches(gradients, {name: sum(e[name] for e in expected.values()) / 3 for name in expected["retain"]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", STRATEGY)
def test_a_list_with_one_end_of_the_tied_matrix(strategy: str, backend: str):
    golden = golden_gradients(f"{strategy}/forget")
    absent = torch.ones(META["vocab_size"], dtype=torch.bool)
    absent[torch.from_numpy(GOLDEN["input_ids"]).flatten()] = False  # of these only the head's part is there
    ends = {kind: run(backend, strategy, ["forget"], kind)[2] for kind in ("embedding", "head")}
    for kind, gradients in ends.items():
        own = gradients[TIED][absent]
        assert_matches({"absent": own}, {"absent": golden[TIED][absent] * (kind == "embedding")})
        assert_matches(gradients, {name: value for name, value in golden.items() if name != TIED})
    assert_matches({TIED: ends["embedding"][TIED] + ends["head"][TIED]}, {TIED: golden[TIED]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joint", ["masked", "strict", "listed"])
def test_joint_lists_under_activation_masking(joint: str, backend: str):
    """Unlabeled and retain tokens are as under every strategy; forget tokens leave the list alone and nothing else."""
    for label in ("default", "retain"):
        gradients = run(backend, "activation_masking", [label], joint)[2]
        assert_matches(gradients, golden_gradients(f"parameter_masking/{label}"))
    free, listed = (run(backend, "activation_masking", ["forget"], j)[2] for j in ("free", joint))
    for name in golden_gradients("parameter_masking/forget"):
        want = torch.zeros_like(free[name]) if masked_by(joint, name) else free[name]
        assert torch.equal(listed[name], want), name
