"""Weights of a run with or without adapters: `adapters.safetensors` beside the base's weights in a checkpoint.

The checkpoint of an adapted run (`sgtm adapt`) holds the weights of its source as they are, and the adapters in a file
of their own. The full model is merged when it is loaded; the model without the domain is the source's, to the bit. The
file holds `<matrix>.a` and `<matrix>.b` in fp32 (sgtm/model/adapters.py), and as metadata `adapters`, JSON of `domain`
and `alpha`: a single entry, as safetensors writes several in any order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch

from sgtm.distributed.storage import stored_weights
from sgtm.model.adapters import Adapter, Adapters, with_adapters
from sgtm.model.lazy_state import LazyState

ADAPTERS = "adapters.safetensors"
_ENTRY = "adapters"


class DomainAdapters(NamedTuple):
    """The adapters of a domain. alpha: their product is scaled by alpha / rank."""

    domain: str
    alpha: float
    by_matrix: Adapters

    @property
    def scale(self) -> float:
        rank = len(next(iter(self.by_matrix.values())).a)
        return self.alpha / rank

    def tensors(self) -> dict[str, torch.Tensor]:
        """As the file has them."""
        return {
            f"{matrix}.{part}": tensor
            for matrix, adapter in self.by_matrix.items()
            for part, tensor in adapter._asdict().items()
        }

    def metadata(self) -> dict[str, str]:
        return {_ENTRY: json.dumps({"domain": self.domain, "alpha": self.alpha})}


def adapted_domain(checkpoint: Path | str) -> str | None:
    """Whose adapters a checkpoint holds; None for one without any. Raises ValueError for a file of another kind."""
    metadata = _metadata(Path(checkpoint) / ADAPTERS)
    return None if metadata is None else metadata["domain"]


def read_adapters(checkpoint: Path | str) -> DomainAdapters | None:
    """None for a checkpoint without any. Raises ValueError for a file of another kind."""
    file = Path(checkpoint) / ADAPTERS
    metadata = _metadata(file)
    if metadata is None:
        return None
    from safetensors.torch import load_file

    tensors = load_file(file)
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    by_matrix = {name: Adapter(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in names}
    return DomainAdapters(metadata["domain"], metadata["alpha"], by_matrix)


def weights_of(checkpoint: Path | str, adapters: bool = True) -> LazyState:
    """The whole state of a model in fp32, by name, on the CPU; a tensor is read when it is taken.

    adapters  whether those of an adapted run are merged into it; without them it is the base
    """
    weights = stored_weights(checkpoint)
    stored = read_adapters(checkpoint) if adapters else None
    return weights if stored is None else with_adapters(weights, stored.by_matrix, stored.scale)


def _metadata(file: Path) -> dict | None:
    if not file.exists():
        return None
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        entries = stored.metadata() or {}
    if _ENTRY not in entries:
        raise ValueError(f"{file} was not written by sgtm adapt: its metadata lack {_ENTRY!r}; move it away")
    return json.loads(entries[_ENTRY])
