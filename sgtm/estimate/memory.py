"""Memory of one rank, as the engine configures DeepSpeed: what is held all the time, and the most that a step adds.

Held: weights, the optimizer's fp32 copy of them and its moments, and gradients in fp32 (ZeRO 1 in fp32 keeps those as
`.grad`). With hpZ also the second copy of the weights, from their first release to the end of the step.
tests/dist/test_estimate.py compares this with the tensors of engines on 2 and 4 ranks, and the size of a checkpoint
with the files that they write.

Added in a micro-batch: the weights that ZeRO-3 has gathered, buckets of gradients on their way, activations that the
backward pass needs, and the larger of what the loss and the backward pass of a block work with. Added by the
optimizer's step: copies of gradients. Activations are those of the `torch` backend on a GPU without masks; tests
compare them with what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil

from sgtm.config.schema import Config
from sgtm.estimate.shapes import parameter_sizes
from sgtm.estimate.traffic import is_bf16_optimizer, padded, sent_width, split, width_of
from sgtm.estimate.zero3 import Limits, gathers, persistent

FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed flattens at a time where it reduces without ZeRO
LOGITS_CHUNK, LOGITS_ROWS, FP32_ROWS = 2**28, 64, 1024  # of the fused head and loss (cross_entropy/pytorch.py)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    held     on the device all the time, by what it is
    passing  on the device during forward and backward, on top of that, at most
    updating on the device during the optimizer's step, on top of that
    host     in the memory of the host, with `distributed.offload_optimizer`
    """

    held: dict[str, int]
    passing: dict[str, int]
    updating: int = 0
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.held.values()) + max(sum(self.passing.values()), self.updating)


def memory(config: Config, stage: int, ranks: int, limits: Limits | None = None) -> Memory:
    """Of a rank in a run of this config on `ranks` ranks, in this stage whatever the config's is.

    Raises ValueError for ZeRO 0 with `distributed.offload_optimizer`.
    """
    config, offload = config.for_ranks(ranks), config.distributed.offload_optimizer
    if offload and stage == 0:
        raise ValueError("distributed.offload_optimizer: ZeRO 0 keeps the optimizer with the weights")
    limits, sizes = limits or Limits(), parameter_sizes(config)
    held = _held(config, sizes, stage, ranks, limits)
    passing, updating = _buffers(config, sizes, stage, ranks, limits)
    passing["activations"] = activations(config)
    passing["working"] = max(_head(config), _block(config)) + max(sizes.values()) * width_of(config)
    host = {}
    if offload:
        share = _share(sizes, stage, ranks)
        host = {name: held.pop(name) for name in ("fp32 weights", "moments")}
        host |= {"gradients": 4 * share} | ({"weights": width_of(config) * share} if stage < 3 else {})
        if stage == 3:
            del held["gradients"]
        updating = 0
    return Memory(held, passing, updating, host)


def checkpoint_bytes(config: Config, stage: int) -> int:
    """Of a checkpoint, all ranks' files together: fp32 weights and moments, and but for ZeRO 3 the model's weights.

    ZeRO 0 in fp32 has no other copy of these. Left out: some kB of names and counts for each rank, and padding.
    """
    total, width = sum(parameter_sizes(config).values()), width_of(config)
    twice = stage < 3 and not (stage == 0 and width == 4)
    return total * (12 + (width if twice else 0))


def _share(sizes: dict[str, int], stage: int, ranks: int) -> int:
    """Elements of the optimizer's tensors on one rank."""
    return (split(sizes.values(), ranks) if stage == 3 else padded(sum(sizes.values()), ranks)) // ranks


def _held(config: Config, sizes: dict[str, int], stage: int, ranks: int, limits: Limits) -> dict:
    width, total, share = width_of(config), sum(sizes.values()), _share(sizes, stage, ranks)
    if stage == 0 and width == 4:
        return {"weights": 4 * total, "fp32 weights": 0, "moments": 8 * total, "gradients": 4 * total}
    whole = sum(sizes[name] for name in persistent(sizes, limits))
    weights = width * (share + whole if stage == 3 else padded(total, ranks))
    gradients = 4 * (share if stage > 1 else padded(total, ranks))
    if stage == 2 and width == 4:
        gradients = 4 * _whole(list(sizes.values()), share, ranks)
    held = {"weights": weights, "fp32 weights": 4 * share, "moments": 8 * share, "gradients": gradients}
    always = stage == 3 or _is_zero1(config, stage)  # from the first backward pass of a step on
    staged = sent_width(config) if stage == 3 else 4
    second = config.distributed.zero_hpz_partition_size if stage == 3 else 1
    if second > 1:
        large = (size for name, size in sizes.items() if name not in persistent(sizes, limits))
        held["hpZ weights"] = width * split(large, ranks) // second
    return held | ({"bucket": staged * min(total, limits.bucket)} if always else {})


def _whole(sizes: list[int], share: int, ranks: int) -> int:
    """Most elements of parameters that begin or end in one share: in fp32 ZeRO 2 keeps the gradients of those whole."""
    ends = list(accumulate(sizes))
    within = [
        sum(size for size, end in zip(sizes, ends, strict=True) if end > start and end - size < start + share)
        for start in range(0, ranks * share, share)
    ]
    return max(within)


def _is_zero1(config: Config, stage: int) -> bool:
    """Whether DeepSpeed's ZeRO 1 runs, and not its bf16 optimizer instead."""
    return stage == 1 and not is_bf16_optimizer(config, stage)


def _buffers(
    config: Config, sizes: dict[str, int], stage: int, ranks: int, limits: Limits
) -> tuple[dict[str, int], int]:
    """What communication needs during forward and backward, and what the step copies."""
    width, total, share = width_of(config), sum(sizes.values()), _share(sizes, stage, ranks)
    bucket, sent = min(total, limits.bucket), sent_width(config)
    if stage == 3:
        live = width * gathers(config, limits).peak
        return {"gathered weights": live, "buckets": sent * bucket}, 4 * min(share, limits.sub_group)
    if stage == 2:  # as it comes, twice as one is filled while the other is sent; flattened; and as it is sent
        cast = sent if sent != width else 0
        return {"buckets": (3 * width + cast) * bucket}, 0 if width == 2 else 4 * share
    if _is_zero1(config, stage):
        return {"buckets": (4 + (sent if sent < 4 else 0)) * bucket}, 8 * share
    if width == 2:  # shares of all ranks as they are sent, and the sum of this rank's
        return {"buckets": (sent * bucket + sent * bucket // ranks) if sent < 4 and ranks > 1 else 0}, 0
    return {"buckets": (4 + (sent if sent < 4 else 0)) * min(total, FALLBACK_BUCKET)}, 0


def activations(config: Config) -> int:
    """Bytes that autograd keeps from the forward pass of a micro-batch: the blocks', and the last hidden states'."""
    model, width = config.model, width_of(config)
    tokens = config.micro_batch * model.context
    last = 2 * width * model.hidden_size * tokens  # the final norm's input, and the gradient of its output
    if model.activation_checkpointing:
        inputs = (model.layers - 1) * width * model.hidden_size * tokens  # of the blocks that wait
        return inputs + block_activations(config) + last
    return model.layers * block_activations(config) + last


def block_activations(config: Config) -> int:
    """Bytes that autograd keeps for one block: inputs of norms and matmuls, q, k, v, attention's output, and the MLP
    before and after its non-linearity, or the experts that the tokens run through."""
    model, width = config.model, width_of(config)
    q, kv = model.heads * model.size_per_head, model.num_kv_heads * model.size_per_head
    rotated = 0 if model.family == "gpt_neo" else q + kv
    attention = 2 * model.hidden_size + (q + 2 * kv) + rotated + q
    mlp = 2 * model.hidden_size + (2 if model.family == "gpt_neo" else 3) * model.intermediate_size
    statistics = 4 * (model.heads + 2)
    if run := model.experts_run:  # before the non-linearity alone; the choice, its weights in fp32 too, and its order
        mlp = 2 * model.hidden_size + 2 * model.intermediate_size * run + model.experts_per_token
        statistics += 12 * model.experts_per_token + 8 * run
        if config.train.expert_balance:  # the router's logits, and a token's weight
            statistics += width * model.experts + 4
    return config.micro_batch * model.context * (width * (attention + mlp) + statistics)


def _head(config: Config) -> int:
    """A chunk of logits, its rows in fp32, and the head's gradient, which the loss computes in the forward pass."""
    model, width = config.model, width_of(config)
    rows = max(LOGITS_ROWS, LOGITS_CHUNK // (model.vocab_size * width))
    tokens = min(rows, config.micro_batch * model.context)
    return model.vocab_size * (width * (tokens + model.hidden_size) + 8 * min(FP32_ROWS, tokens))


def _block(config: Config) -> int:
    """Gradients inside one block: of the MLP before and after its non-linearity, and of the hidden states.

    Of experts: the tokens gathered for them, in and out, with their gradients; one expert at a time is smaller.
    """
    model, gated = config.model, config.model.family == "llama"
    if run := model.experts_run:
        second = model.neurons * model.hidden_size * width_of(config)  # gradients of w_in and w_out come together
        gathered = (4 * run + 2) * model.hidden_size
        return ceil(config.micro_batch * model.context * width_of(config) * gathered) + second
    columns = (3 if gated else 2) * model.intermediate_size + 2 * model.hidden_size
    return ceil(config.micro_batch * model.context * width_of(config) * columns)
