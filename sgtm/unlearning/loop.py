"""The steps of an unlearning, and of the training of adapters, in fp32 on one process.

AdamW with weight decay 0.01 and otherwise PyTorch's defaults, a constant learning rate and gradients clipped at norm 1
(the papers of sgtm/unlearning/methods.py use AdamW; TOFU and its successors decay 0.01 and clip at 1, as transformers'
Trainer does). All groups are active and nothing is masked.

A step gives a line {"kind": "unlearn" or "adapt", "step": from 1, "loss": what is minimised, "lr", "grad_norm": before
clipping, "seconds": since the first step}, and by method `loss/forget` and `loss/retain` (nats per target) or
`distance/forget` and `distance/retain` (mean square of a hidden state's elements), all of them before the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch

from sgtm.model.transformer import Transformer
from sgtm.unlearning.methods import METHODS
from sgtm.unlearning.text import Loss, Sequences
from sgtm_kernels.plan import Tables

WEIGHT_DECAY, CLIP = 0.01, 1.0


def unlearn(
    model: Transformer,
    method: str,
    forget: Sequences | None,
    retain: Sequences | None,
    tables: Tables,
    *,
    options: dict,
    steps: int,
    lr: float,
    log: Callable[[dict], None],
) -> None:
    """Change the model in place. None: sequences that the method does not read; log: takes the line of every step.

    Raises ValueError where a loss or gradient is not finite, and as the method does.
    """
    of_method = METHODS[method]
    reference = deepcopy(model).requires_grad_(False) if of_method.reference else None
    names = of_method.learns(model, options) if of_method.learns else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(names is None or name in names)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device

    def loss_of(step: int) -> Loss:
        texts = [sequences and sequences.text(step, device, tables) for sequences in (forget, retain)]
        return of_method.loss(model, reference, *texts, **options)

    descend(parameters, loss_of, kind="unlearn", what=method, steps=steps, lr=lr, log=log)
    model.requires_grad_()


def descend(
    parameters: Sequence[torch.nn.Parameter],
    loss_of: Callable[[int], Loss],
    *,
    kind: str,
    what: str,
    steps: int,
    lr: float,
    log: Callable[[dict], None],
) -> None:
    """Change the parameters in place, by the gradient of the loss of every step, counted from 0.

    kind, what  of the lines of the log; of the message where a loss or gradient is not finite, a ValueError
    """
    optimizer, began = torch.optim.AdamW(parameters, lr, weight_decay=WEIGHT_DECAY), time.perf_counter()
    for step in range(steps):
        loss, parts = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        values = {name: float(value) for name, value in {"loss": loss.detach(), **parts, "grad_norm": norm}.items()}
        if not all(map(math.isfinite, values.values())):
            bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise ValueError(f"{what}: not finite in step {step + 1}: {bad}; take a lower --lr than {lr:.3g}")
        optimizer.step()
        seconds = round(time.perf_counter() - began, 3)
        log({"kind": kind, "step": step + 1, **values, "lr": lr, "seconds": seconds})
