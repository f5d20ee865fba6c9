"""AdamW through torch's fused multi-tensor kernel (CPU and CUDA): one pass over the memory of the slices.

Slices are handed over as they come and never merged, so that the arithmetic of a slice (where its vectorised part ends)
does not depend on whether its neighbour is frozen. One call for each weight decay, in practice two for all weights.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw as torch_adamw


def adamw(updates, lr, betas, eps):
    by_decay: dict[float, list] = {}
    for update in updates:
        by_decay.setdefault(update.decay, []).append(update)
    for decay, group in by_decay.items():
        weights, grads, exp_avgs, exp_avg_sqs, steps, _ = zip(*group, strict=True)
        # torch counts the step up before it uses it, one fp32 scalar for each slice, on the device of the weights
        counts = torch.tensor([step - 1.0 for step in steps]).to(weights[0].device, non_blocking=True)
        torch_adamw(
            list(weights),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=decay,
            eps=eps,
            maximize=False,
        )
