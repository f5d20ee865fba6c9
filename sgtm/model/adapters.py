"""Low-rank adapters on the linear maps of the blocks (LoRA: Hu et al. 2021, arXiv 2106.09685, section 4.1).

A matrix W [out, in] is used as W + (alpha / rank) * B A, with A [rank, in] and B [out, rank]. B begins at 0, so that
the model begins as the one without adapters, to the bit. `w_qkv` is one map to queries, keys and values together, and
the `w_in` of a gated MLP one to gate and up, as they are stored. `w_o` and `w_out` are stored as [in, out]: they take
the transposed product.

The paper draws A from a normal distribution and gives no deviation. Here it is in^-0.5, so that A x has elements as
large as those of x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from sgtm.model.lazy_state import LazyState
from sgtm.model.rows import IN_SIDE, OUT_SIDE
from sgtm.model.transformer import Transformer

State = Mapping[str, torch.Tensor]


class Adapter(NamedTuple):
    """a  [rank, in]; b: [out, rank]; both fp32"""

    a: torch.Tensor
    b: torch.Tensor


Adapters = Mapping[str, Adapter]
"""By name of the matrix, as in `Transformer.named_parameters()`."""


def adapted_names(state: State) -> list[str]:
    """The matrices of the blocks, in the order of the model's state."""
    return [name for name in state if name.startswith("blocks.") and _leaf(name) in (*IN_SIDE, *OUT_SIDE)]


def new_adapters(state: State, rank: int, seed: int) -> dict[str, Adapter]:
    """Adapters of all matrices of the blocks, on the CPU; A follows from the seed and B is 0.

    state  weights of the model, or tensors of their shapes

    Raises ValueError for a rank below 1, or above what one of the matrices can have.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Adapter] = {}
    for name in adapted_names(state):
        outputs, inputs = _out_in(name, state[name])
        if not 1 <= rank <= min(outputs, inputs):
            raise ValueError(
                f"rank {rank}: an adapter of {name}, {outputs} outputs by {inputs} inputs, has a rank from 1 to "
                f"{min(outputs, inputs)}"
            )
        a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        adapters[name] = Adapter(a, torch.zeros(outputs, rank))
    return adapters


def parameter_count(adapters: Adapters) -> int:
    return sum(tensor.numel() for adapter in adapters.values() for tensor in adapter)


def merged(name: str, weight: torch.Tensor, adapter: Adapter, scale: float) -> torch.Tensor:
    """The matrix with its adapter, as it is stored; scale: alpha / rank."""
    product = adapter.b @ adapter.a
    return weight + scale * (product.t() if _leaf(name) in OUT_SIDE else product)


def with_adapters(state: State, adapters: Adapters, scale: float) -> LazyState:
    """The weights of a model with its adapters merged, each when it is taken; the others are those of `state`.

    Raises ValueError unless every matrix of the blocks has an adapter of its shape, and nothing else has one.
    """
    shapes = {name: (_out_in(name, state[name])) for name in adapted_names(state)}
    if {name: (len(b), a.shape[1]) for name, (a, b) in adapters.items()} != shapes:
        raise ValueError("the adapters are not those of this model: their matrices have other names or shapes")

    def read(name: str) -> torch.Tensor:
        return merged(name, state[name], adapters[name], scale) if name in adapters else state[name]

    return LazyState(state, read)


def attach(model: Transformer, adapters: Adapters, scale: float) -> dict[str, Adapter]:
    """Let the model compute with adapters, which alone learn from now on; returns the parameters A and B, by matrix.

    The blocks read the merged matrix wherever they use the matrix, so that gradients reach A and B through it. The
    model cannot be saved or resumed in this form: take its own weights from where it came from.
    """
    model.requires_grad_(False)
    learning: dict[str, Adapter] = {}
    for name, adapter in adapters.items():
        path, _, leaf = name.rpartition(".")
        device = model.get_parameter(name).device
        low_rank = _LowRank(name, Adapter(*(tensor.to(device) for tensor in adapter)), scale)
        parametrize.register_parametrization(model.get_submodule(path), leaf, low_rank)
        learning[name] = Adapter(low_rank.a, low_rank.b)
    return learning


class _LowRank(nn.Module):
    """The merged matrix of a matrix."""

    def __init__(self, name: str, adapter: Adapter, scale: float):
        super().__init__()
        self.name, self.scale = name, scale
        self.a, self.b = nn.Parameter(adapter.a.clone()), nn.Parameter(adapter.b.clone())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return merged(self.name, weight, Adapter(self.a, self.b), self.scale)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _out_in(name: str, weight: torch.Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return (columns, rows) if _leaf(name) in OUT_SIDE else (rows, columns)
