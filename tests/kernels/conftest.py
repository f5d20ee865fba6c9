"""Where there is a GPU the kernels are tested on it: what a test makes without naming a device lies there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode


class DrawnOnCPU(TorchFunctionMode):
    """What is drawn from a generator of the CPU is drawn there and moved: the same numbers on every device."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("generator") is None or kwargs.get("device") is not None:
            return function(*args, **kwargs)
        return function(*args, **kwargs, device="cpu").to(self.device)


@contextmanager
def tensors_on(device: str) -> Iterator[None]:
    with torch.device(device), DrawnOnCPU(device):
        yield


@pytest.fixture(autouse=True)
def on_the_gpu(request):
    """Tests marked cpu are of code for a CPU, and stay there."""
    if not torch.cuda.is_available() or request.node.get_closest_marker("cpu"):
        yield
    else:
        with tensors_on("cuda"):
            yield
