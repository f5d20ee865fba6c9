"""Weights of Hugging Face, both ways.

Hugging Face keeps heads, neurons and experts in their original order and linear weights as [out, in]; we store them
group by group, and out-side weights as [in, out] (see `sgtm.model.rows`). An export puts them back at their original
indices and can leave groups out; an import permutes them into the groups of a partition.

Promises, each with a test in `tests/unit/test_weights.py`: import(export(x)) is x bit for bit; the logits of an export
are those of our model with the removed groups inactive; and no weight of a removed group is in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.config import hf_config, model_config_from_hf
from sgtm.hf.experts import experts_from_hf, experts_to_hf, folder_state
from sgtm.hf.names import BUFFERS, HEAD, names_of
from sgtm.hf.units import fuse, unfuse, units_of
from sgtm.masking.partition import Partition
from sgtm.process.names import did_you_mean

State = dict[str, Tensor]


class Conversion:
    """Our model as Hugging Face's: `config`, and by `tensors` the weights, one after the other.

    remove     domains whose groups are left out. Their heads (with their KV heads) and neurons are physically gone
               where every layer is left with the same number; where Hugging Face cannot express fewer (GPT-Neo's heads,
               layers of unequal width) their weights and in-side biases are exactly 0. Experts must be gone: one of
               zeros would still be chosen
    strengths  by domain, what the outputs of its group are multiplied by, above 0 and up to 1; 1 where it is not named
    prune      False: what is removed is exactly 0 everywhere, and the model keeps its shape

    A domain's own part of embedding and head is added to the shared matrices, unless it is removed.

    Raises ValueError for an unknown domain, one that is both removed and has a strength, a strength of another size,
    experts that cannot go, and what Hugging Face's models do not have: GPT-Neo a head bias, Granite MoE (with
    shared experts) heads of another width.
    """

    def __init__(
        self,
        config: ModelConfig,
        partition: Partition,
        remove: Iterable[str] = (),
        strengths: Mapping[str, float] | None = None,
        prune: bool = True,
    ):
        self._model, self._partition = config, partition
        self._factors = _factors(partition, tuple(remove), strengths or {})
        self._present = tuple(float(factor > 0) for factor in self._factors)
        self._layers = [units_of(layer, config.size_per_head) for layer in partition.layers]
        full = {"heads": config.heads, "kv_heads": config.num_kv_heads}
        full |= {"experts": config.experts} if config.experts else {"neurons": config.intermediate_size}
        left = {owner: {units[owner].remaining(self._present) for units in self._layers} for owner in full}
        fewer_heads = config.family != "gpt_neo" and not config.shared_experts
        heads = prune and fewer_heads and len(left["heads"]) == 1
        self._drop = {"heads": heads, "kv_heads": heads}
        self._drop |= {owner: prune and len(left[owner]) == 1 for owner in full if owner not in self._drop}
        if config.experts:
            _check_experts(left["experts"], config.experts, self._drop["experts"])
        sizes = {owner: min(left[owner]) if self._drop[owner] else full[owner] for owner in full}
        self.config: PretrainedConfig = hf_config(config, **sizes)

    def tensors(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every weight, in the order of the layers; the tied head comes as the embedding alone.

        state  of our model; each of its tensors is taken once. Those without owners are given out as they are.
        """
        names, shared = names_of(self._model.family, self._model.shared_experts), self._model.shared_experts
        for ours, theirs in names.outer.items():
            yield theirs, self._with_domains(state, ours) if ours == "embedding" else state[ours]
        if not self._model.tie_embeddings:
            yield HEAD, self._with_domains(state, "head")
        for i, units in enumerate(self._layers):
            for weight in names.weights:
                tensor = state[f"blocks.{i}.{weight.ours}"]
                factors = self._factors if weight.transposed else self._present
                if weight.has_experts:
                    drop = self._drop["experts"]
                    for name, part in experts_to_hf(tensor, weight, units["experts"], shared, factors, drop):
                        yield names.block.format(i) + name, part
                    continue
                owners = [units[owner] for owner in weight.owners]
                parts = unfuse(tensor, [owner.row_counts for owner in owners]) if owners else [tensor]
                if owners:
                    dropping = [self._drop[owner] for owner in weight.owners]
                    parts = [u.to_original(p, factors, d) for u, p, d in zip(owners, parts, dropping, strict=True)]
                for name, part in zip(weight.theirs, parts, strict=True):
                    yield names.block.format(i) + name, part.t().contiguous() if weight.transposed else part

    def _with_domains(self, state: Mapping[str, Tensor], end: str) -> Tensor:
        """A shared matrix plus the parts of the domains that are left."""
        weight = state[end]
        for group in range(1, len(self._factors)) if self._partition.embedding != "none" else ():
            if factor := self._factors[group]:
                name = f"{end}_{group}"
                full = self._partition.embedding == "full"
                own = state[name] if full else state[f"{name}_rows"] @ state[f"{name}_basis"]
                weight = weight + (own if factor == 1 else factor * own)
        return weight


def to_hf_state(
    state: Mapping[str, Tensor], config: ModelConfig, partition: Partition, remove: Iterable[str] = (), **options
) -> tuple[State, PretrainedConfig]:
    """State dict and config of a `Conversion`, which takes the options; a tied head has its own name too."""
    conversion = Conversion(config, partition, remove, **options)
    hf = dict(conversion.tensors(state))
    if config.tie_embeddings:
        hf[HEAD] = hf[names_of(config.family, config.shared_experts).outer["embedding"]]
    return hf, conversion.config


def from_hf_state(hf_state: State, config: PretrainedConfig, partition: Partition) -> State:
    """Our state of a Hugging Face model, its heads and neurons permuted into the groups of `partition`.

    It holds nothing for a domain's own part of embedding and head, which such a model does not have.

    Raises ValueError for a config that we cannot compute, a partition of another shape, and tensors that are missing or
    that we have no place for.
    """
    ours = model_config_from_hf(config)
    _check_partition(partition, ours)
    names = names_of(ours.family, ours.shared_experts)
    hf = {name: tensor for name, tensor in hf_state.items() if not name.endswith(BUFFERS)}
    hf = folder_state(hf, config.model_type)

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
        units = units_of(layer, ours.size_per_head)
        for weight in names.weights:
            if weight.has_experts:
                block = names.block.format(i)
                shared = ours.shared_experts
                state[f"blocks.{i}.{weight.ours}"] = experts_from_hf(take, block, weight, units["experts"], shared)
                continue
            parts = [take(names.block.format(i) + name) for name in weight.theirs]
            if weight.transposed:
                parts = [part.t().contiguous() for part in parts]
            owners = [units[owner] for owner in weight.owners]
            if owners:
                parts = [owner.to_groups(part) for owner, part in zip(owners, parts, strict=True)]
                parts = [fuse(parts, [owner.row_counts for owner in owners])]
            state[f"blocks.{i}.{weight.ours}"] = parts[0]
    if hf:
        raise ValueError(f"{config.model_type} weights hold tensors that this model has no place for: {sorted(hf)[:5]}")
    return state


def _factors(partition: Partition, remove: tuple[str, ...], strengths: Mapping[str, float]) -> tuple[float, ...]:
    """By group, what its outputs are multiplied by; that of retain, and so of a layer without groups, is 1."""
    domains = partition.groups[1:]
    for what, named in (("remove", remove), ("reduce", strengths)):
        if unknown := [domain for domain in named if domain not in domains]:
            names = ", ".join(f"{domain!r}{_slip(domain, domains)}" for domain in unknown)
            raise ValueError(f"cannot {what} {names}; domains: {', '.join(domains)}")
    for domain, strength in strengths.items():
        if domain in remove:
            raise ValueError(f"{domain} cannot be both removed and reduced to strength {strength:g}")
        if not 0 < strength <= 1:
            raise ValueError(f"the strength of {domain} is {strength:g}; give one above 0 and up to 1, or remove it")
    return tuple(0.0 if group in remove else float(strengths.get(group, 1)) for group in partition.groups)


def _check_experts(left: set[int], experts: int, drop: bool) -> None:
    """Raises ValueError where experts are removed that do not go; left: how many are, by layer."""
    if not drop and left != {experts}:
        why = "masking.masked_layers leaves layers with different numbers" if len(left) > 1 else "nothing is pruned"
        raise ValueError(
            f"experts of a removed domain cannot be zeroed, as the router would still choose them, but {why}; "
            f"{'train with groups in all layers' if len(left) > 1 else 'leave out --zeroed'}"
        )


def _slip(domain: str, domains: Iterable[str]) -> str:
    bare = domain.partition(":")[2]  # of a label, forget:<domain> or open:<domain>
    return f" (did you mean {bare}?)" if bare in domains else did_you_mean(domain, domains)


def _check_partition(partition: Partition, config: ModelConfig) -> None:
    wanted = (config.heads, config.num_kv_heads, config.neurons, config.experts)
    sizes = {
        (sum(layer.heads), sum(layer.kv_heads), sum(layer.neurons), sum(layer.experts)) for layer in partition.layers
    }
    if len(partition.layers) != config.layers or sizes != {wanted}:
        raise ValueError(
            f"the partition is of {len(partition.layers)} layers with (heads, KV heads, neurons, experts) "
            f"{sorted(sizes)}, the imported model has {config.layers} layers with {wanted}"
        )
