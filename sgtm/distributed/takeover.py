"""Replaced parts of DeepSpeed's optimizers (0.19): gradient reduction, the gradient norm, and clipping.

Each of its optimizers reduces, checks for overflow and clips in its own way, and reads the device for each. Here all
take the norm from sgtm/distributed/gradient_norm.py, and AdamW clips by a factor while it reads the gradient, not in a
separate pass.

    ZeRO 0 in fp32     plain data parallelism: the stop flag is one more element of the gradients' all-reduce
    ZeRO 0, 1 in bf16  its bf16 optimizer would all-reduce the fp32 gradients of the whole model: reduce-scattered
    ZeRO 1, 2          all-reduced, or each share reduced to its owner (DistributedConfig.reduces_to_owners). With
                       `overlap_comm`, DeepSpeed would wait for the device before each of the latter and after every
                       backward pass; streams wait for one another instead
    ZeRO 3             reduce-scatters by itself; it waits for the device once in a backward pass (not replaced)

`replace` sets private names of DeepSpeed only where they exist, so that another version fails at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups

from sgtm.distributed.gradient_norm import GradientNorm

Cut = Callable[[torch.Tensor, list[torch.Tensor]], Iterable[tuple[torch.Tensor, int]]]


class Takeover:
    """The parts of one DeepSpeed engine that are replaced.

    on_norm  called in every step when the norms are known, before the optimizer's step; returns the norm for DeepSpeed,
            infinite if the step is to be skipped
    cut      cuts the gradient of one of the optimizer's tensors, given in consecutive pieces, into pieces of one owner
            each, and returns them with their owners; None: one owns all
    """

    def __init__(
        self, engine, gradient_norm: GradientNorm, bucket: int, on_norm: Callable[[], float], cut: Cut | None = None
    ):
        self.engine, self.optimizer, self.bucket, self.cut = engine, engine.optimizer, bucket, cut
        self.gradient_norm, self.on_norm = gradient_norm, on_norm
        self.flags = torch.zeros(1, device=gradient_norm.device)
        if isinstance(self.optimizer, BF16_Optimizer):
            replace(engine, "buffered_allreduce_fallback", self.reduce_scatter)
            replace(self.optimizer, "step", self.step)
            replace(self.optimizer, "_update_hp_grad", self.add_gradient)
        elif hasattr(self.optimizer, "fp32_partitioned_groups_flat"):
            replace(self.optimizer, "_get_norm_groups", lambda: [torch.tensor(self.norm())])
            replace(self.optimizer, "unscale_and_clip_grads", nothing)
        elif hasattr(self.optimizer, "single_partition_of_fp32_groups"):
            replace(self.optimizer, "check_overflow", nothing)
            replace(self.optimizer, "scaled_global_norm", self.norm)
            replace(self.optimizer, "update_offload_overflow_tracker", nothing)
            replace(self.optimizer, "allreduce_bucket", self.stream_safe_reduction())
            replace(self.optimizer, "allreduce_and_copy", self.reduce_to_owner)
            replace(self.optimizer, "independent_gradient_partition_epilogue", self.epilogue())
        else:
            replace(engine, "_get_gradients_for_reduction", self.gradients())

    def norm(self) -> float:
        """Of the gradient that ZeRO 1 to 3 have partitioned; of the optimizer in the host's memory by parameter."""
        zero = self.optimizer
        by_parameter = getattr(zero, "norm_for_param_grads", None)
        if by_parameter is None:
            sharded = hasattr(zero, "fp32_partitioned_groups_flat")
            tensors = zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
            self.reduce_norms((tensors[group], pieces) for group, pieces in zero.averaged_gradients.items())
        else:
            device = self.gradient_norm.device
            norms = [norm.to(device) for norm in by_parameter.values()] or [torch.zeros((), device=device)]
            self.gradient_norm.reduce_norms(torch.stack(norms))
        return self.on_norm()

    def plain_norm(self) -> float:
        """Of gradients that every rank has whole: ZeRO 0 in fp32."""
        self.reduce_norms(((p, [p.grad]) for p in self.engine.module.parameters() if p.grad is not None), self.flags)
        return self.on_norm()

    def reduce_norms(
        self, gradients: Iterable[tuple[torch.Tensor, list[torch.Tensor]]], flags: torch.Tensor | None = None
    ) -> None:
        """Agree on the norms of these gradients: tensors of the optimizer, each with its gradient in pieces."""
        if self.cut is None:
            self.gradient_norm.reduce([piece for _, pieces in gradients for piece in pieces], flags)
            return
        cut = [pair for tensor, pieces in gradients for pair in self.cut(tensor, pieces)]
        self.gradient_norm.reduce([piece for piece, _ in cut], flags, [owner for _, owner in cut])

    def gradients(self) -> Callable:
        """What plain data parallelism reduces, and the stop flag."""
        inner = self.engine._get_gradients_for_reduction

        def with_flag():
            gradients, experts = inner()
            self.flags = self.gradient_norm.flag()
            return [*gradients, self.flags], experts

        return with_flag

    def reduce_scatter(self, grads=None, elements_per_buffer=None) -> None:
        """Of the bf16 optimizer: the sum of each share on its rank, in place. What else the gradient holds is stale."""
        flats, shares = self.optimizer.fp32_groups_gradients_flat, self.optimizer.fp32_groups_gradient_flat_partition
        ranks = self.gradient_norm.ranks
        for flat, share in zip(flats, shares, strict=True) if ranks > 1 else ():
            if self.engine.communication_data_type == flat.dtype:
                dist.reduce_scatter_tensor(share, flat)
                continue
            by_rank, size = flat.view(ranks, -1), max(1, self.bucket // ranks)
            for start in range(0, share.numel(), size):
                sent = by_rank[:, start : start + size].to(self.engine.communication_data_type).contiguous()
                received = torch.empty_like(sent[0])
                dist.reduce_scatter_tensor(received, sent.view(-1))
                share[start : start + size].copy_(received)

    @torch.no_grad()
    def add_gradient(self, parameter: torch.Tensor, group: int, number: int, clear_lp_grads: bool) -> None:
        """Of the bf16 optimizer, as its `_update_hp_grad`, but the first micro-batch's is copied, not added to zeros.

        A copy converts as it writes; an addition takes a converted tensor, and reads the sum as well.
        """
        if parameter.grad is None:
            return
        total, summed = self.optimizer.fp32_groups_gradients[group][number], self.optimizer.fp32_groups_has_gradients
        gradient = parameter.grad.view(total.shape)
        if summed[group][number]:
            total.add_(gradient.to(total.dtype))
        else:
            total.copy_(gradient)
        parameter._hp_grad = total  # type: ignore[attr-defined]  # DeepSpeed's own
        summed[group][number] = True
        if clear_lp_grads:
            parameter.grad.zero_()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Of the bf16 optimizer, as BF16_Optimizer.step but for the norm and the clipping."""
        bf16 = self.optimizer
        gradients = zip(bf16.fp32_groups_flat_partition, bf16.fp32_groups_gradient_flat_partition, strict=True)
        self.reduce_norms((weights, [gradient]) for weights, gradient in gradients)
        norm = self.on_norm()
        bf16._global_grad_norm, bf16.overflow = norm, not math.isfinite(norm)
        if not bf16.overflow:
            for weights, gradient in zip(
                bf16.fp32_groups_flat_partition, bf16.fp32_groups_gradient_flat_partition, strict=True
            ):
                weights.grad = gradient
            bf16.optimizer.step()
            bf16._lazy_init_hp_params_optimizer_state()
            self.update_weights()
        # The engine of DeepSpeed clears the gradient right after this.

    def update_weights(self) -> None:
        """Of the bf16 optimizer, as its `update_lp_params`, but only weights that the step has changed are copied."""
        bf16 = self.optimizer
        for weights, shares, ranks in zip(
            bf16.fp32_groups_flat_partition, bf16.bf16_partitioned_groups, bf16.real_dp_process_group, strict=True
        ):
            share = shares[dist.get_rank(group=ranks)]
            for start, end in bf16.optimizer.changed(weights):
                share[start:end].copy_(weights[start:end])
        all_gather_dp_groups(
            groups_flat=bf16.bf16_groups_flat,
            partitioned_param_groups=bf16.bf16_partitioned_groups,
            dp_process_group=bf16.real_dp_process_group,
            start_alignment_factor=bf16.nccl_start_alignment_factor,
            allgather_bucket_size=bf16.allgather_bucket_size,
        )

    def stream_safe_reduction(self) -> Callable:
        """The reductions of ZeRO 1 and 2, with the gradients kept while the other stream of `overlap_comm` reads them:
        DeepSpeed frees at once what another rank owns."""
        zero, inner = self.optimizer, self.optimizer.allreduce_bucket

        def reduce(bucket: list[torch.Tensor], *args, **kwargs) -> torch.Tensor:
            reduced = inner(bucket, *args, **kwargs)
            if zero.overlap_comm and not get_accelerator().resolves_data_dependency():
                for gradient in (reduced, *bucket):
                    gradient.record_stream(zero.reduction_stream)
            return reduced

        return reduce

    def reduce_to_owner(
        self,
        small_bucket: list[torch.Tensor],
        communication_data_type: torch.dtype,
        rank: int | None = None,
        log=None,
        divide: bool = True,
        process_group=None,
        output_bucket: list[torch.Tensor | None] | None = None,
    ) -> None:
        """Of ZeRO 1 and 2, as their `allreduce_and_copy`, but no host waits; on the stream that is current."""
        zero = self.optimizer
        reduced = zero.allreduce_bucket(
            small_bucket, communication_data_type, rank=rank, divide=divide, process_group=process_group
        )
        if rank is not None and rank != dist.get_rank(group=process_group or zero.dp_process_group):
            return
        outputs = output_bucket or [None] * len(small_bucket)
        for gradient, total, output in zip(small_bucket, zero.unflatten(reduced, small_bucket), outputs, strict=True):
            zero._add_to_grad_partition_buffer(output, total)
            gradient.copy_(total)

    def epilogue(self) -> Callable[[], None]:
        """Of a backward pass in ZeRO 1 and 2: with `overlap_comm`, the stream of the next one waits for the reductions,
        in place of the host."""
        zero, accelerator = self.optimizer, get_accelerator()
        inner, synchronize = zero.independent_gradient_partition_epilogue, accelerator.synchronize

        def in_order() -> None:
            replace(
                accelerator, "synchronize", lambda *_: accelerator.current_stream().wait_stream(zero.reduction_stream)
            )
            try:
                inner()
            finally:
                replace(accelerator, "synchronize", synchronize)

        return in_order if zero.overlap_comm else inner


def nothing(*args, **kwargs) -> None:
    """Replaces a method that is not needed."""


def replace(owner: object, name: str, value: object) -> None:
    """Set a private name of DeepSpeed. Raises RuntimeError where it is not there: setting it would change nothing."""
    if name not in (owner if isinstance(owner, dict) else dir(owner)):
        where = "__compatible_ops__" if isinstance(owner, dict) else getattr(owner, "__name__", type(owner).__name__)
        raise RuntimeError(f"deepspeed {deepspeed.__version__} has no {name} in {where}; SGTM needs 0.19 (setup.py)")
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)
