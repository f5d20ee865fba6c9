"""Memory of a rank: activations against autograd, and what offload and hpZ move.

What it holds is compared with real runs in tests/dist/test_estimate.py.
"""

import pytest
import torch

from sgtm.config import load_config
from sgtm.estimate.memory import activations, memory
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import check_fits, estimate
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import LabelRun, MaskPlan


def saved_bytes(config) -> int:
    """Storage that autograd keeps for the backward pass of an unmasked micro-batch, weights apart."""
    model = Transformer(config.model, config.partition).to(torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tensors = []
    size = config.train.micro_batch, config.model.context
    ids = torch.randint(config.model.vocab_size, size)
    masks = MaskPlan(config.tables, [LabelRun(0, 0, ids.numel())], *size)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        model(ids, ids, masks, 1.0, balance=config.train.expert_balance)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    head = 2 * config.model.vocab_size * config.model.hidden_size  # its gradient, which the plan counts elsewhere
    return sum(size for address, size in storages.items() if address not in weights) - head


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["gpt_neo", "llama", "mixtral", "mixtral, balanced"])
def test_activations_are_what_autograd_keeps(family, checkpointed):
    family, _, balanced = family.partition(", ")
    options = [
        f"--model.family={family}", f"--model.activation_checkpointing={checkpointed}", "--model.window=null",
        "--model.hidden_size=256", "--model.intermediate_size=640", "--model.heads=4", "--model.context=128",
        "--model.layers=3", "--train.precision=bf16", "--train.micro_batch=4",
    ]  # fmt: skip
    if family == "mixtral":
        options += ["--model.experts=5", "--model.experts_per_token=2", "--model.shared_experts=1"]
        options += ["--masking.forget_neurons=0", "--masking.forget_experts=2"]
    if balanced:  # so many that their logits count
        options += ["--train.expert_balance=0.01", "--model.experts=300", "--model.intermediate_size=32"]
    config = load_config("debug", options)
    expected = saved_bytes(config)
    if checkpointed:  # the block that is computed again comes on top during the backward pass, its input apart
        plain = load_config("debug", [*options, "--model.activation_checkpointing=false"])
        less = load_config("debug", [*options, "--model.activation_checkpointing=false", "--model.layers=2"])
        expected += saved_bytes(plain) - saved_bytes(less) - 2 * 4 * 128 * 256
    assert activations(config) == pytest.approx(expected, rel=0.05)


def test_offload_moves_the_optimizer_to_the_host():
    config, offloaded = load_config("llama-1b"), load_config("llama-1b", ["--distributed.offload_optimizer=true"])
    for stage in (1, 2, 3):
        plain_memory, offload_memory = memory(config, stage, 8), memory(offloaded, stage, 8)
        moved = {name: offload_memory.host[name] for name in ("fp32 weights", "moments")}
        assert moved == {name: plain_memory.held[name] for name in moved}
        assert not moved.keys() & offload_memory.held.keys()
    with pytest.raises(ValueError, match="ZeRO 0 keeps the optimizer"):
        memory(offloaded, 0, 8)
    assert [row.stage for row in estimate(offloaded, Machine(gpus=8))] == [1, 2, 3]


HPZ = ("--distributed.zero_stage=3", "--distributed.zero_hpz_partition_size=4")


def test_hpz_keeps_the_weights_a_second_time():
    plain, config = load_config("llama-1b", [HPZ[0]]), load_config("llama-1b", list(HPZ))
    second = memory(config, 3, 16).peak - memory(plain, 3, 16).peak
    assert second == pytest.approx(2 * sum(parameter_sizes(config).values()) / 4, rel=1e-3)
    with pytest.raises(ValueError, match=r"what fits: .*distributed\.zero_hpz_partition_size 1"):
        check_fits(config, 16, memory(plain, 3, 16).peak, "a GPU")
