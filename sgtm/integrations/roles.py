"""Which modules of a transformer belong to whom, and where their groups lie in the stored weights.

Groups are the last heads and neurons of each layer, in the order of the domains: one range, or three, of dimension 0 or
1 of a weight. A `Family` is the table of an architecture, of Hugging Face (families.py) or torchtitan (torchtitan.py).

Every parameter of the model must be in the table: what is not (an adapter, cross-attention) is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import nn

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.stretches import Owned
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import LayerPartition, Partition, build_partition
from sgtm.model.rows import ALWAYS

# By their full names: a subclass may compute something else, and its module need not be installed.
CONV1D = "transformers.pytorch_utils.Conv1D"
LINEARS = ("torch.nn.modules.linear.Linear", "torchtitan.models.common.linear.Linear")
EMBEDDINGS = ("torch.nn.modules.sparse.Embedding", "torchtitan.models.common.embedding.Embedding")
NORMS = ("torch.nn.modules.normalization.LayerNorm", "torchtitan.models.common.nn_modules.RMSNorm")
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
Owner = Literal["heads", "kv_heads", "neurons"]


@dataclass(frozen=True)
class Role:
    """One module of a block or of the model.

    name   path in the block, or in the model
    kind   the projection, or the joint kind, whose `update` table holds
    owner  who owns the outputs of an in-side projection or the inputs of an out-side one; None: a joint parameter
    parts  how often the owners follow one another along the outputs (3: `q | k | v`)
    share  vectors of the owner's size that each owner has side by side (3: `q k v` of each head)
    """

    name: str
    kind: str
    owner: Owner | None = None
    parts: int = 1
    share: int = 1


@dataclass(frozen=True)
class Family:
    """Names of the blocks' list, of the modules in a block, and of those outside."""

    blocks: str
    block: tuple[Role, ...]
    outer: tuple[Role, ...]

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks).children())


@dataclass(frozen=True)
class Masked:
    """A module that is masked: its role, group boundaries in one part of its outputs or inputs, and its parameters."""

    path: str
    module: nn.Module
    role: Role
    bounds: tuple[int, ...]
    owned: dict[str, Owned]


def partition_of(
    model: nn.Module, family: Family, heads: int, kv_heads: int, masking: MaskingConfig, space: LabelSpace
) -> Partition:
    """Groups of the model's heads and neurons.

    Raises ValueError for groups that do not fit, of experts, and of listed indices: they must be the last ones here.
    """
    if masking.forget_experts:
        raise ValueError(f"masking.forget_experts {masking.forget_experts}: no model here has experts; set it 0")
    for key in ("forget_heads", "forget_neurons"):
        value = getattr(masking, key)
        if isinstance(value, dict) and any(isinstance(count, list) for count in value.values()):
            raise ValueError(f"masking.{key} {value}: here a domain has the last ones of each layer; give counts")
    return build_partition(
        space,
        layers=len(family.blocks_of(model)),
        heads=heads,
        kv_heads=kv_heads,
        neurons=_neurons(model, family),
        forget_heads=masking.forget_heads,
        forget_neurons=masking.forget_neurons,
        percent=masking.percent,
        masked_layers=masking.masked_layers,
    )


def masked_modules(model: nn.Module, family: Family, partition: Partition) -> list[Masked]:
    """All modules with masks, in the order of the model; those of layers without groups have none.

    Raises ValueError for modules of another class than the family's own, and for parameters that are in none of them.
    """
    masked = [_masked(model, role) for role in family.outer]
    free: set[str] = set()
    for index, layer in enumerate(partition.layers):
        prefix = f"{family.blocks}.{index}"
        block = model.get_submodule(prefix)
        _check_known(prefix, block, family)
        if partition.masked(index):
            masked += [_masked(model, role, layer, partition.groups, f"{prefix}.") for role in family.block]
        else:
            free.update(f"{prefix}.{name}" for name, _ in block.named_parameters())
    covered = free | {f"{m.path}.{name}" for m in masked for name, _ in m.module.named_parameters(recurse=False)}
    if unknown := sorted({name for name, _ in model.named_parameters()} - covered):
        raise ValueError(f"no mask covers the parameters {', '.join(unknown[:5])}; remove what was added to it")
    return masked


def owned_parameters(model: nn.Module, masked: list[Masked]) -> dict[str, Owned]:
    """Who owns every parameter, by name in `named_parameters()`; a tied matrix has the kinds of both ends."""
    by_parameter: dict[int, Owned] = {}
    for module in masked:
        for name, owned in module.owned.items():
            number = id(getattr(module.module, name))
            if before := by_parameter.get(number):
                owned = Owned(0, owned.bounds, (f"{before.keys[0]}+{owned.keys[0]}",), owned.rows, owned.columns)
            by_parameter[number] = owned
    owners = {}
    for name, parameter in model.named_parameters():
        rows, columns = (*_shape(parameter), 1)[:2]
        owners[name] = by_parameter.get(id(parameter), Owned(0, (0, rows), (ALWAYS,), rows, columns))
    return owners


def class_of(module: nn.Module) -> str:
    """Its full name; of a masked module, that of the class which it had before."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _neurons(model: nn.Module, family: Family) -> int:
    (name,) = [role.name for role in family.block if role.kind == "mlp_out"]
    sizes = {_sizes(block.get_submodule(name))[0] for block in family.blocks_of(model)}
    if len(sizes) != 1:
        raise ValueError(f"layers of {sorted(sizes)} neurons cannot be masked; all must have the same number")
    return sizes.pop()


def _sizes(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, also where ZeRO-3 has emptied its weight."""
    if class_of(module) in LINEARS:
        return module.in_features, module.out_features
    if class_of(module) == CONV1D:
        return module.nx, module.nf
    raise ValueError(f"a linear layer of class {type(module).__name__} cannot be masked; only nn.Linear and Conv1D can")


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 has emptied it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _check_known(path: str, block: nn.Module, family: Family) -> None:
    roles = tuple(role.name for role in family.block)
    for name, module in block.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and name not in roles:
            raise ValueError(f"{path}.{name} ({type(module).__name__}) is unknown: the masks would miss its parameters")


def _masked(
    model: nn.Module,
    role: Role,
    layer: LayerPartition | None = None,
    groups: tuple[str, ...] = (),
    prefix: str = "",
) -> Masked:
    path = prefix + role.name
    module: Any = model.get_submodule(path)
    if role.owner is None:
        return Masked(path, module, role, (), _joint(path, module, role))
    assert layer is not None
    inputs, outputs = _sizes(module)
    incoming = role.kind.endswith("_in")
    counts: tuple[int, ...] = getattr(layer, role.owner)
    size = (outputs if incoming else inputs) // role.parts // sum(counts)
    bounds = (0, *accumulate(count * size for count in counts))
    if bounds[-1] * role.parts != (outputs if incoming else inputs) or size % role.share:
        raise ValueError(
            f"{path} has {inputs} inputs and {outputs} outputs: {sum(counts)} {role.owner} of one size do not fit"
        )
    along = (0, *accumulate(count * size for _ in range(role.parts) for count in counts))
    keys = tuple(f"{role.kind}.{group}" for _ in range(role.parts) for group in groups)
    stored_inputs_first = class_of(module) == CONV1D
    shape = (inputs, outputs) if stored_inputs_first else (outputs, inputs)
    owned = {"weight": Owned(int(incoming == stored_inputs_first), along, keys, *shape)}
    if module.bias is not None:
        bias = (along, keys) if incoming else ((0, outputs), (f"{role.kind}_bias",))
        owned["bias"] = Owned(0, *bias, outputs)
    return Masked(path, module, role, bounds, owned)


def _joint(path: str, module: nn.Module, role: Role) -> dict[str, Owned]:
    """Raises ValueError for a norm, embedding or head that computes something else than the masked one would."""
    shape: tuple[int, ...]
    if isinstance(module, nn.Embedding):
        plain = class_of(module) in EMBEDDINGS and module.max_norm is None and not module.scale_grad_by_freq
        shape = (module.num_embeddings, module.embedding_dim)
        plain = plain and not module.sparse
    elif role.kind == "head":
        inputs, outputs = _sizes(module)
        plain, shape = class_of(module) in LINEARS and module.bias is None, (outputs, inputs)
    else:
        plain = class_of(module) in NORMS or type(module).__name__ in RMS_NORMS
        shape = next(_shape(parameter) for parameter in module.parameters())
    if not plain:
        raise ValueError(f"{path} ({module}) cannot be masked: it is not what the family has there")
    return {name: Owned(0, (0, shape[0]), (role.kind,), *shape) for name, _ in module.named_parameters(recurse=False)}
