"""torchtitan on CPUs: where it is, and what its trainer 0.3.0 has for GPUs alone, replaced.

Import it first, in a rank and not in the process of the tests, where other packages would find those of that folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

TITAN = Path(__file__).parents[1] / ".venv" / "torchtitan"
"""Written by the Makefile."""


class Memory:
    device_name, device_capacity_gib = "cpu", 1.0

    def get_peak_stats(self):
        from torchtitan.components.metrics import DeviceMemStats

        return DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def prepare() -> None:
    sys.path.append(str(TITAN))
    torch._utils._get_available_device_type = lambda: "cpu"  # read by the first import

    import torchtitan.components.metrics as metrics
    import torchtitan.distributed.fsdp as fsdp
    import torchtitan.distributed.utils as utils

    divide = fsdp.disable_fsdp_gradient_division

    def divide_without_premultiplied_sums(model) -> None:
        """A divisor of 1 leads to a sum that multiplies its terms, which gloo does not have."""
        divide(model)
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    fsdp.disable_fsdp_gradient_division = divide_without_premultiplied_sums
    metrics.build_device_memory_monitor = Memory
    utils.set_pg_timeouts = lambda **kwargs: None  # waits at a barrier of GPUs


prepare()
