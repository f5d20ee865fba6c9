"""Weights rounded to few bits, as users of an export round them: some unlearning is undone by it (arXiv 2410.16454).

The matrices of the blocks are rounded to the nearest of 2^bits - 1 levels, symmetric about 0, with one scale for every
`GROUP` inputs of an output; embedding, head, norms and biases stay. Rows of removed groups are zeros first, as in an
export: nothing of them is left in a scale.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from sgtm.model.rows import IN_SIDE, OUT_SIDE
from sgtm.model.transformer import Transformer

GROUP = 64  # inputs of one scale


def rounded(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """weight [outputs, inputs] at the nearest level; a group of inputs has levels up to its largest magnitude.

    Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"levels on both sides of 0 take 2 bits or more, got {bits}")
    inputs = weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -inputs % group)).unflatten(1, (-1, group))
    scale = padded.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = torch.where(scale > 0, padded / scale, 0.0).round()
    return (levels * scale).flatten(1)[:, :inputs]


@torch.no_grad()
def quantised(model: Transformer, bits: int, removed: Iterable[str] = (), group: int = GROUP) -> Transformer:
    """A copy of the model with rounded matrices, and zeros in the rows of the removed domains' groups.

    Raises ValueError for a domain that the model does not have.
    """
    removed = list(removed)
    if unknown := set(removed) - set(model.partition.groups[1:]):
        raise ValueError(f"the model has no group {', '.join(sorted(unknown))}; it has {model.partition.groups[1:]}")
    edited = copy.deepcopy(model)
    parameters, rows = dict(edited.named_parameters()), edited.parameter_rows()
    for name, parameter in parameters.items():
        kind = name.rpartition(".")[2]
        if kind not in (*IN_SIDE, *OUT_SIDE):
            continue
        for key, start, end in zip(rows[name].keys, rows[name].bounds[:-1], rows[name].bounds[1:], strict=True):
            if key.rpartition(".")[2] in removed:
                parameter[start:end] = 0
        # Rows are the outputs of in-side matrices, and the inputs of out-side ones.
        weight = parameter if kind in IN_SIDE else parameter.t()
        values = rounded(weight, bits, group)
        parameter.copy_(values if kind in IN_SIDE else values.t())
    return edited
