"""Weights of Hugging Face, both ways.

Hugging Face keeps heads and neurons in their original order and linear weights as [out, in]; we store them group by
group, and out-side weights as [in, out] (see `sgtm.model.rows`). An export puts heads and neurons back at their
original indices and can leave groups out; an import permutes them into the groups of a partition.

Promises, each with a test in `tests/unit/test_weights.py`: import(export(x)) is x bit for bit; the logits of an export
are those of our model with the removed groups inactive; and no weight of a removed group is in it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.config import hf_config, model_config_from_hf
from sgtm.masking.partition import LayerPartition, Partition
from sgtm.model.domain_parts import ends
from sgtm.process.names import did_you_mean

State = dict[str, Tensor]


@dataclass(frozen=True)
class Weight:
    """One of our block parameters and what Hugging Face makes of it.

    theirs      names there; several where we fuse them
    owners      who owns the rows of each: `heads`, `kv_heads` or `neurons`; empty for a joint parameter
    transposed  stored there as [out, in], here as [in, out]
    """

    ours: str
    theirs: tuple[str, ...]
    owners: tuple[str, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Names:
    """Parameter names of a family: `outer` outside the blocks, `weights` inside block `block.format(i)`."""

    outer: dict[str, str]
    block: str
    weights: tuple[Weight, ...]


NAMES = {
    "gpt_neo": Names(
        {
            "embedding": "transformer.wte.weight",
            "position": "transformer.wpe.weight",
            "final_norm.weight": "transformer.ln_f.weight",
            "final_norm.bias": "transformer.ln_f.bias",
        },
        "transformer.h.{}.",
        (
            Weight("attention_norm.weight", ("ln_1.weight",)),
            Weight("attention_norm.bias", ("ln_1.bias",)),
            Weight(
                "attention.w_qkv",
                tuple(f"attn.attention.{x}_proj.weight" for x in "qkv"),
                ("heads", "kv_heads", "kv_heads"),
            ),
            Weight("attention.w_o", ("attn.attention.out_proj.weight",), ("heads",), transposed=True),
            Weight("attention.b_o", ("attn.attention.out_proj.bias",)),
            Weight("mlp_norm.weight", ("ln_2.weight",)),
            Weight("mlp_norm.bias", ("ln_2.bias",)),
            Weight("mlp.w_in", ("mlp.c_fc.weight",), ("neurons",)),
            Weight("mlp.b_in", ("mlp.c_fc.bias",), ("neurons",)),
            Weight("mlp.w_out", ("mlp.c_proj.weight",), ("neurons",), transposed=True),
            Weight("mlp.b_out", ("mlp.c_proj.bias",)),
        ),
    ),
    "llama": Names(
        {"embedding": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"},
        "model.layers.{}.",
        (
            Weight("attention_norm.weight", ("input_layernorm.weight",)),
            Weight(
                "attention.w_qkv", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), ("heads", "kv_heads", "kv_heads")
            ),
            Weight("attention.w_o", ("self_attn.o_proj.weight",), ("heads",), transposed=True),
            Weight("mlp_norm.weight", ("post_attention_layernorm.weight",)),
            Weight("mlp.w_in", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("neurons", "neurons")),
            Weight("mlp.w_out", ("mlp.down_proj.weight",), ("neurons",), transposed=True),
        ),
    ),
}
HEAD = "lm_head.weight"
# Not weights: constants that older versions of transformers saved beside them.
BUFFERS = (".attn.attention.bias", ".attn.attention.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Units:
    """The heads, KV heads or neurons of one layer: how many each group has, their original order, rows of each."""

    counts: tuple[int, ...]
    order: Sequence[int]
    rows_each: int

    @property
    def row_counts(self) -> tuple[int, ...]:
        return tuple(count * self.rows_each for count in self.counts)

    def remaining(self, removed: Collection[int]) -> int:
        return sum(count for group, count in enumerate(self.counts) if group not in removed)

    def to_original(self, rows: Tensor, removed: Collection[int], drop: bool) -> Tensor:
        """Rows in the original order, those of `removed` groups left out (`drop`) or exactly 0."""
        units = rows.unflatten(0, (len(self.order), self.rows_each))
        group_of = [group for group, count in enumerate(self.counts) for _ in range(count)]
        indices = sorted(range(len(self.order)), key=self.order.__getitem__)
        if drop:
            indices = [index for index in indices if group_of[index] not in removed]
        original = units[indices]
        original[[group_of[index] in removed for index in indices]] = 0
        return original.flatten(0, 1)

    def to_groups(self, rows: Tensor) -> Tensor:
        """Rows of the original order, in the order of the groups."""
        return rows.unflatten(0, (len(self.order), self.rows_each))[list(self.order)].flatten(0, 1)


def to_hf_state(
    state: State, config: ModelConfig, partition: Partition, remove: Iterable[str] = ()
) -> tuple[State, PretrainedConfig]:
    """Hugging Face state dict and config of our model without the groups of the domains in `remove`.

    Removed heads (with their KV heads) and neurons are physically gone where every layer is left with the same number;
    where Hugging Face cannot express fewer (GPT-Neo's heads, layers of unequal width) their weights and in-side biases
    are exactly 0. A domain's own part of embedding and head is added to the shared matrices, unless it is removed. A
    tied head appears under its own name too, the same tensor as the embedding. Tensors without owners are shared with
    `state`, not copied, where no domain has such a part.

    Raises ValueError for an unknown domain and for a head bias, which Hugging Face's GPT-Neo does not have.
    """
    removed = _removed_groups(partition, remove)
    layers = [_units(layer, config.size_per_head) for layer in partition.layers]
    left = {owner: {units[owner].remaining(removed) for units in layers} for owner in ("heads", "kv_heads", "neurons")}
    uniform_heads = config.family == "llama" and len(left["heads"]) == 1
    drop = {"heads": uniform_heads, "kv_heads": uniform_heads, "neurons": len(left["neurons"]) == 1}
    full = {"heads": config.heads, "kv_heads": config.num_kv_heads, "neurons": config.intermediate_size}
    shape = hf_config(config, **{owner: left[owner].pop() if drop[owner] else full[owner] for owner in full})

    names = NAMES[config.family]
    state = state | {end: _with_domains(state, end, partition, removed) for end in ends(config.tie_embeddings)}
    hf = {theirs: state[ours] for ours, theirs in names.outer.items()}
    hf[HEAD] = state["embedding" if config.tie_embeddings else "head"]
    for i, units in enumerate(layers):
        for weight in names.weights:
            tensor = state[f"blocks.{i}.{weight.ours}"]
            owners = [units[owner] for owner in weight.owners]
            parts = _unfuse(tensor, [owner.row_counts for owner in owners]) if owners else [tensor]
            if owners:
                dropping = [drop[owner] for owner in weight.owners]
                parts = [u.to_original(p, removed, d) for u, p, d in zip(owners, parts, dropping, strict=True)]
            for name, part in zip(weight.theirs, parts, strict=True):
                hf[names.block.format(i) + name] = part.t().contiguous() if weight.transposed else part
    return hf, shape


def _with_domains(state: State, end: str, partition: Partition, removed: Collection[int]) -> Tensor:
    """A shared matrix plus the parts of the domains that are left."""
    weight = state[end]
    for group in range(1, len(partition.groups)) if partition.embedding != "none" else ():
        if group not in removed:
            name = f"{end}_{group}"
            own = state[name] if partition.embedding == "full" else state[f"{name}_rows"] @ state[f"{name}_basis"]
            weight = weight + own
    return weight


def from_hf_state(hf_state: State, config: PretrainedConfig, partition: Partition) -> State:
    """Our state of a Hugging Face model, its heads and neurons permuted into the groups of `partition`.

    It holds nothing for a domain's own part of embedding and head, which such a model does not have.

    Raises ValueError for a config that we cannot compute, a partition of another shape, and tensors that are missing or
    that we have no place for.
    """
    ours = model_config_from_hf(config)
    _check_partition(partition, ours)
    names = NAMES[ours.family]
    hf = {name: tensor for name, tensor in hf_state.items() if not name.endswith(BUFFERS)}

    def take(name: str) -> Tensor:
        if name not in hf:
            raise ValueError(f"{config.model_type} weights lack {name!r}")
        return hf.pop(name)

    state = {mine: take(theirs) for mine, theirs in names.outer.items()}
    if not ours.tie_embeddings:
        state["head"] = take(HEAD)
    elif not torch.equal(hf.pop(HEAD, state["embedding"]), state["embedding"]):
        raise ValueError(f"{config.model_type} config ties the head to the embedding, but {HEAD!r} differs from it")
    for i, layer in enumerate(partition.layers):
        units = _units(layer, ours.size_per_head)
        for weight in names.weights:
            parts = [take(names.block.format(i) + name) for name in weight.theirs]
            if weight.transposed:
                parts = [part.t().contiguous() for part in parts]
            owners = [units[owner] for owner in weight.owners]
            if owners:
                parts = [owner.to_groups(part) for owner, part in zip(owners, parts, strict=True)]
                parts = [_fuse(parts, [owner.row_counts for owner in owners])]
            state[f"blocks.{i}.{weight.ours}"] = parts[0]
    if hf:
        raise ValueError(f"{config.model_type} weights hold tensors that this model has no place for: {sorted(hf)[:5]}")
    return state


def _units(layer: LayerPartition, head_dim: int) -> dict[str, Units]:
    q_per_kv = sum(layer.heads) // sum(layer.kv_heads)
    kv_order = [head // q_per_kv for head in layer.head_order[::q_per_kv]]
    return {
        "heads": Units(layer.heads, layer.head_order, head_dim),
        "kv_heads": Units(layer.kv_heads, kv_order, head_dim),
        "neurons": Units(layer.neurons, layer.neuron_order, 1),
    }


def _fuse(parts: list[Tensor], row_counts: list[tuple[int, ...]]) -> Tensor:
    """[q k v of retain | q k v of domain 1 | ...] from q, k and v, whose groups have `row_counts` rows."""
    pieces = [part.split(counts) for part, counts in zip(parts, row_counts, strict=True)]
    return torch.cat([piece for group in zip(*pieces, strict=True) for piece in group])


def _unfuse(fused: Tensor, row_counts: list[tuple[int, ...]]) -> list[Tensor]:
    """Inverse of `_fuse`."""
    pieces = fused.split([count for group in zip(*row_counts, strict=True) for count in group])
    return [torch.cat(pieces[i :: len(row_counts)]) for i in range(len(row_counts))]


def _removed_groups(partition: Partition, remove: Iterable[str]) -> frozenset[int]:
    """Indices of the removed groups; 0 (retain) is never among them, so a layer without groups loses nothing."""
    remove = tuple(remove)
    unknown = [domain for domain in remove if domain not in partition.groups[1:]]
    if unknown:
        domains = partition.groups[1:]
        names = ", ".join(f"{domain!r}{_slip(domain, domains)}" for domain in unknown)
        raise ValueError(f"cannot remove {names}; domains: {', '.join(domains)}")
    return frozenset(partition.groups.index(domain) for domain in remove)


def _slip(domain: str, domains: Iterable[str]) -> str:
    bare = domain.partition(":")[2]  # of a label, forget:<domain> or open:<domain>
    return f" (did you mean {bare}?)" if bare in domains else did_you_mean(domain, domains)


def _check_partition(partition: Partition, config: ModelConfig) -> None:
    wanted = (config.heads, config.num_kv_heads, config.intermediate_size)
    sizes = {(sum(layer.heads), sum(layer.kv_heads), sum(layer.neurons)) for layer in partition.layers}
    if len(partition.layers) != config.layers or sizes != {wanted}:
        raise ValueError(
            f"the partition is of {len(partition.layers)} layers with (heads, KV heads, neurons) {sorted(sizes)}, "
            f"the imported model has {config.layers} layers with {wanted}"
        )
