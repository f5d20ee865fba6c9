"""AdamW with exact freeze for the parameters of a masked Hugging Face model.

A group or joint kind that no token of the global step may update keeps its weights, both moments and its own step count
bit for bit; nothing decays it. Which ones those are follows from the labels of the step's forward passes, on all
ranks. How the update leaves them alone, under DeepSpeed and FSDP2 too: sgtm/integrations/range_adamw.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgtm.integrations.binding import LABELS, Binding, binding_of
from sgtm.integrations.range_adamw import StretchAdamW, refuse_fsdp1
from sgtm.model.rows import live_keys


class SgtmAdamW(StretchAdamW):
    """AdamW (Loshchilov and Hutter, 2019) that leaves alone what the labels of a step may not update.

    model   masked by `apply_sgtm`, before DeepSpeed takes it (then `bind(engine.optimizer)`), after `fully_shard`
    params  parameters or groups of them, as for any optimizer; all of the model's that need gradients, if None

    State of a parameter: `exp_avg`, `exp_avg_sq`, of its shape, dtype and sharding. The number of updates of each key
    is in every group of `param_groups`, as `steps`, and with it in a state dict.

    Raises ValueError for a model without masks, for parameters that are not the model's, for FSDP1, and in `step` where
    no forward pass had labels since the last one.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        refuse_fsdp1(model)
        self.binding: Binding = binding_of(model)
        super().__init__(model, self.binding.owned, params, lr, betas, eps, weight_decay)
        steps = {key: 0 for owned in self.binding.owned.values() for key in sorted(owned.keys)}
        for group in self.param_groups:
            group["steps"] = steps
        self._live: frozenset[str] = frozenset()
        self._in_groups = False

    def bind(self, wrapper: Any) -> None:
        """As `RangeAdamW.bind`. DeepSpeed's optimizer then ends a global step here too, taken or skipped."""
        super().bind(wrapper)
        self._in_groups = wrapper is not self  # ZeRO 0 in fp32 has no other one
        if self._in_groups:
            step = wrapper.step

            def ended(*args: Any, **kwargs: Any) -> Any:
                try:
                    return step(*args, **kwargs)
                finally:
                    self.binding.new_step()

            wrapper.step = ended

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also forgets which labels have been trained."""
        super().zero_grad(set_to_none)
        self.binding.new_step()

    def _live_keys(self) -> frozenset[str]:
        """What this global step updates, on all ranks; raises ValueError where none had labels."""
        if self.binding.stepped and self._in_groups:  # another group of DeepSpeed's in the same global step
            return self._live
        trained = set() if self.binding.stepped else self.binding.trained
        labels = _on_all_ranks(trained, len(self.binding.space.labels))
        if not labels:
            raise ValueError(
                f"no forward pass since the last step had {LABELS}; pass them in every training micro-batch"
            )
        self.binding.stepped = True
        steps = self.param_groups[0]["steps"]
        self._live = live_keys(self.binding.tables, labels).intersection(steps)
        for key in self._live:
            steps[key] += 1
        for group in self.param_groups:
            group["steps"] = steps  # one dict again after `load_state_dict`
        return self._live

    def _count_update(self, group: dict[str, Any], parameter: Tensor) -> Mapping[str, int]:
        return group["steps"]

    def _rehearses(self) -> bool:
        no_step = not (self.state or self.binding.trained or self.binding.stepped)
        return no_step and all(group["lr"] == 0 for group in self.param_groups)

    def _unbound(self) -> bool:
        return bool(self.binding.trained) or super()._unbound()


def _on_all_ranks(labels: Iterable[int], number: int) -> list[int]:
    """The labels of all ranks. With NCCL the host waits for the answer, once in a global step."""
    trained = torch.zeros(number, dtype=torch.int32)
    trained[list(labels)] = 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_backend() == "nccl":  # has no tensors of the host; where the parameters are does not matter
            trained = trained.cuda()
        dist.all_reduce(trained, dist.ReduceOp.MAX)
    return trained.cpu().nonzero().flatten().tolist()
