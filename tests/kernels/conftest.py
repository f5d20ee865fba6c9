"""Where there is a GPU the kernels are tested on it: what a test makes without naming a device lies there."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode
from tunables import SMALL, TUNABLES

from sgtm_kernels.attention import kernel as attention_kernel
from sgtm_kernels.cross_entropy import kernel as cross_entropy_kernel
from sgtm_kernels.linear import kernel as linear_kernel
from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.triton_common.tuning import table_of


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


@pytest.fixture(autouse=True)
def no_table(monkeypatch):
    """No test is launched by a table of the machine, or a variable of the shell, that it runs in."""
    monkeypatch.delenv("SGTM_TUNED", raising=False)
    monkeypatch.delenv("SGTM_LINEAR", raising=False)
    table_of.cache_clear()
    yield
    table_of.cache_clear()


@pytest.fixture
def others(monkeypatch):
    """Candidates in fp32, which the interpreter is right in, where it is only bf16 that has some."""
    tiles = {
        "attention_forward": (attention_kernel.Tile(16, 16, 4, 1), attention_kernel.Tile(16, 32, 4, 1)),
        "attention_backward_queries": (attention_kernel.Tile(16, 16, 4, 1),),
        "attention_backward_keys": (attention_kernel.Tile(16, 16, 4, 1),),
    }
    for name, configs in tiles.items():
        monkeypatch.setitem(TUNABLES[name].others, ("fp32", 16), configs)
    for name in ("activation_forward", "activation_backward"):
        monkeypatch.setitem(TUNABLES[name].others, ("fp32", "plain"), (SMALL,))
    monkeypatch.setitem(TUNABLES["linear_sums"].others, ("fp32",), (scaling.Tile(16, 16, 64, 4),))
    for length in linear_kernel.LENGTHS:
        monkeypatch.setitem(
            TUNABLES["linear_dw"].others, ("fp32", 4, length), (linear_kernel.DwAlgorithm("rectangles"),)
        )
    monkeypatch.setitem(
        TUNABLES["dw_rectangles"].others, ("fp32", "ones", "ragged"), (rectangles.Tile(16, 16, 16, 4, 1),)
    )
    monkeypatch.setitem(TUNABLES["token_losses"].others, ("fp32", 128), (cross_entropy_kernel.Tile(32, 1),))
