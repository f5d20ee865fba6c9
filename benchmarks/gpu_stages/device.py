"""What the stages that use torch share: the device, and the dtype of each backend on it."""

from __future__ import annotations

import torch
from environment import healthy

from sgtm_kernels.dispatch import unusable
from sgtm_kernels.testing import low_precision

__all__ = ["backends", "device_of", "healthy"]


def device_of(cpu: bool) -> torch.device:
    return torch.device("cpu" if cpu else "cuda")


def backends() -> list[tuple[str, torch.dtype]]:
    """Backends that run here, each in the half precision that it is right in; `triton` first."""
    return [(name, low_precision(name)) for name in ("triton", "torch") if not unusable(name)]
