"""What the machine gives at best, measured between the calls that are compared with it."""

from __future__ import annotations

import torch

MATMUL, COPY = "matmul", "copy"


class Roofline:
    """A big matmul in `dtype` and a copy on the device: the rates that a share of the roofline is a share of."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        n, size = (8192, 2**30) if device.type == "cuda" else (512, 2**24)
        left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
        out = torch.empty_like(left)
        self.flops, self.bytes = 2 * n**3, 2 * size
        self.calls = {MATMUL: lambda: torch.mm(left, right, out=out), COPY: lambda: target.copy_(source)}

    def ideal(self, flops: float, moved: float, times: dict[str, float]) -> float:
        """Seconds that so much work takes at the rates of these two times."""
        return max(flops / self.flops * times[MATMUL], moved / self.bytes * times[COPY])

    def rates(self, times: dict[str, list[float]]) -> dict[str, list[float]]:
        return {
            "tflops": [self.flops / t / 1e12 for t in times[MATMUL]],
            "gb_per_second": [self.bytes / t / 1e9 for t in times[COPY]],
        }
