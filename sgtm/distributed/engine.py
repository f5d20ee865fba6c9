"""The engine: DeepSpeed behind the few calls that training needs. Nothing outside this folder imports deepspeed.

Promises (tests/dist/test_engine.py, tests/dist/test_freeze.py), in every ZeRO stage, in fp32 and bf16, on any number of
ranks:

- the gradient of a global step is the *sum* of the gradients of all losses handed to `backward`, over ranks and
  micro-batches. DeepSpeed averages by default; it is configured to sum. ZeRO 3 cannot, so there the loss is multiplied
  by the number of ranks that DeepSpeed divides by, which is exact for powers of two;
- gradients are accumulated in fp32 and reduced in `distributed.communication` (fp32, unless it is bf16), and the
  optimizer works on fp32 weights;
- frozen weights stay bit-identical (sgtm/distributed/optim.py);
- a step whose gradient, or one of whose losses, is not finite changes nothing on any rank, and `finite` is False then.
  With `optimizer.grad_clip_scope: owner` gradients are clipped, and skipped where they are not finite, by owner,
  whatever the losses are: one owns the retain group and all joint parameters, each domain its group;

A step has one reduction of its own, of the gradient's norm and the stop flag, and reads the device once, for both
(sgtm/distributed/gradient_norm.py); AdamW clips (takeover.py has what that replaces in DeepSpeed).

ZeRO 0 in bf16: DeepSpeed's own accumulates and reduces gradients in bf16, so that contributions of late micro-batches
are lost. That combination runs as its bf16 optimizer with fp32 gradients instead, which DeepSpeed files under ZeRO 1:
weights and gradients are replicated as in ZeRO 0, only the fp32 copy and the moments are sharded.

ZeRO 2 reduces gradients while the backward pass computes, and ZeRO 3 all that it sends (overlap_comm). On a CPU, where
there are no streams, the same code runs in order.

`distributed.offload_optimizer`: the optimizer's tensors are in the host's memory and AdamW runs there, by `torch` where
the kernels are Triton's. All of the above holds with it, but for the single read. It has been run on CPUs, where host
and device are one; on a GPU DeepSpeed also pins the host's buffers and copies gradients into them without waiting
before `step`: that has not been run.

A run agrees with another one to the bit, in all that it computes on the same machine,

- if it is the same run again, or resumed, in the same stage and on the same number of ranks;
- with ZeRO 0 and ZeRO 1 in bf16, which are one optimizer;
- and as long as no gradient is clipped: with and without offload in any stage, with `communication: fp32`; in ZeRO 0, 1
  and 2 on one rank.

The others sum a gradient, or the norm that clips, in another order, or cut a row between ranks, which changes how a
CPU's AdamW rounds; their losses agree within a bound (tests/e2e/test_same_losses.py: 2e-6 nats in fp32, 2e-3 in bf16,
after 20 steps). ZeRO 3 also keeps the weights at other addresses, by which a CPU's matrix product may round otherwise.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_module

from sgtm.config.schema import Config, DistributedConfig
from sgtm.distributed.env import device_type, kernel_backend
from sgtm.distributed.gradient_norm import GradientNorm
from sgtm.distributed.on_ranks import on_every_rank
from sgtm.distributed.optim import SegmentedAdamW
from sgtm.distributed.process_group import outlast_watchdog
from sgtm.distributed.segments import Fragment, check_cover, fragments, full_numel, segment_tables
from sgtm.distributed.storage import STATE_TENSORS, Stored
from sgtm.distributed.takeover import Takeover, replace
from sgtm.distributed.universal import universal_info
from sgtm.distributed.watchdog import enter
from sgtm.distributed.writer import BackgroundWriter
from sgtm.model.rows import owner_of

if TYPE_CHECKING:
    from sgtm.model.transformer import Transformer

if device_type() == "cpu":  # it would compile a shared-memory collective at the first start (35 s, with a compiler)
    replace(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
# Its bf16 optimizer prints the memory in use, and collects garbage each time: a second of every start.
replace(deepspeed.runtime.bf16_optimizer, "see_memory_usage", lambda *args, **kwargs: None)

warnings.filterwarnings("ignore", r".*is deprecated. Please use `torch.distributed", FutureWarning)  # DeepSpeed's calls

# Elements of DeepSpeed's reduction buffer. Its default takes 2 GB of every rank even for the smallest model.
BUCKET = 200_000_000


def deepspeed_config(config: Config, world_size: int, numel: int) -> dict:
    """What users of DeepSpeed write as JSON, derived from our config; `numel` is the model's number of parameters.

    Raises ValueError where ranks do not divide into what the config asks for.
    """
    stage, bf16 = config.distributed.zero_stage, config.train.precision == "bf16"
    return {
        "train_batch_size": config.sequences_per_step,
        "train_micro_batch_size_per_gpu": config.for_ranks(world_size).train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": 0.0,  # AdamW clips
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # it would refuse our optimizer under offload_optimizer
        "zero_optimization": {
            "stage": 1 if stage == 0 and bf16 else stage,
            "reduce_bucket_size": min(numel, BUCKET),
            "allgather_bucket_size": BUCKET,
            **_zero_options(config.distributed, world_size, numel),
        },
        "bf16": {"enabled": bf16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.distributed.communication,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice in every micro-batch
    }


def _zero_options(config: DistributedConfig, world_size: int, numel: int) -> dict:
    config.check_ranks(world_size)
    options: dict = {"offload_optimizer": {"device": "cpu"}} if config.offload_optimizer else {}
    options["overlap_comm"] = config.zero_stage >= 2
    options["use_multi_rank_bucket_allreduce"] = not config.reduces_to_owners(numel, world_size)  # of ZeRO 1 and 2
    if config.zero_stage == 3:
        options["zero_hpz_partition_size"] = config.zero_hpz_partition_size
        options["zero_quantized_weights"] = config.zero_quantized_weights
    return options


class Engine:
    """One model under DeepSpeed.

    module  changed in place (bf16, partitioned). Its forward passes, in training and evaluation, go through the engine:
            `engine(...)`.
    config  the run; all ranks the same

    A global step is `accumulation` times `backward(engine(...))`, then one `step(live, lr)`.
    Needs `init_distributed`. Raises ValueError where tokens per step, micro-batch and ranks do not divide.
    """

    def __init__(self, module: Transformer, config: Config):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.config = config = config.for_ranks(self.world_size)
        self.accumulation = config.accumulation(self.world_size)
        self.losses: list[torch.Tensor] = []
        """What `backward` was given on this rank since the last step began, detached."""
        self._micro_batches = 0
        self._writer = BackgroundWriter()
        rows = module.parameter_rows()
        parameters = dict(module.named_parameters())
        numels = {name: full_numel(p) for name, p in parameters.items()}
        backend = kernel_backend(config.kernels, config.train.precision)
        if config.distributed.offload_optimizer and backend == "triton":
            backend = "torch"  # the optimizer's tensors are the host's
        if config.train.compile == "blocks" and config.distributed.zero_stage == 3:
            for block in module.blocks:  # gathered at once: a hook on a part of a block would cut its graph
                set_z3_leaf_module(block, True)
        self.optimizer = SegmentedAdamW(parameters.values(), config.optimizer, backend)
        with _quiet():
            self._deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=deepspeed_config(config, self.world_size, sum(numels.values())),
                dist_init_required=False,
            )
        outlast_watchdog(config.distributed)
        # It would put its recovery script beside every checkpoint; ours is sgtm/distributed/storage.py.
        replace(self._deepspeed, "_copy_recovery_script", lambda path: None)
        replace(self._deepspeed, "checkpoint_engine", self._writer)
        self.device = torch.device(self._deepspeed.device)
        by_owner = config.optimizer.grad_clip_scope == "owner"
        self._norm = GradientNorm(self.device, self.world_size, len(config.space.groups) if by_owner else 1)
        self._takeover = Takeover(
            self._deepspeed, self._norm, BUCKET, self._set_factors, self.optimizer.cut if by_owner else None
        )
        self._fragments = fragments(self._deepspeed.optimizer, parameters)
        replicas = self.world_size if self._plain else 1
        check_cover(self._fragments, numels, replicas, self.all_reduce_sum)
        keys = {key for layout in rows.values() for key in layout.keys}
        owners = {key: owner_of(key, config.space.groups) for key in keys} if by_owner else None
        rates = {key: config.rate_of(owner_of(key, config.space.groups)) for key in keys}
        self.optimizer.set_segments(segment_tables(self._fragments, numels, rows), keys, owners, rates)

    @property
    def module(self) -> Transformer:
        return self._deepspeed.module

    @property
    def fragments(self) -> list[Fragment]:
        """Where this rank's share of every parameter lives in the optimizer's fp32 tensors."""
        return self._fragments

    def set_weights(self, state: Mapping[str, torch.Tensor]) -> None:
        """Give the optimizer's fp32 weights the values of `state`, which the model was made with.

        DeepSpeed copies them from the model when that is in bf16 already, so they would be rounded.

        state  whole parameters by name, of any shape and floating dtype; those that it lacks stay as they are
        """
        with torch.no_grad():
            for tensor, offset, name, start, end in self._fragments:
                if name in state:
                    values = state[name].reshape(-1)[start:end]
                    tensor.detach().reshape(-1)[offset : offset + end - start].copy_(values)

    @property
    def is_boundary(self) -> bool:
        """Whether all micro-batches of the global step have been through `backward`, so that `step` is next."""
        return self._micro_batches == self.accumulation

    @property
    def _plain(self) -> bool:
        """Whether the client optimizer works on the parameters themselves: ZeRO 0 in fp32."""
        return self._deepspeed.optimizer is self.optimizer

    def __call__(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Transformer.forward` returns."""
        enter("forward" if self.module.training else "evaluation")
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's loss, a scalar already divided by the global number of targets.

        Of a loss that is not finite the gradient is NaN even where it would be finite, as of a target with probability
        0: the step is then skipped on all ranks, without a read of the device. Not so with `grad_clip_scope: owner`,
        where the gradient of one owner must not depend on another's tokens.
        """
        if self.is_boundary:
            raise RuntimeError(f"backward called more than {self.accumulation} times without step")
        enter("backward")
        divisor = self.world_size if self.config.distributed.zero_stage == 3 else 1
        # Multiplied by 1 too: a hook of DeepSpeed on the forward's own output divides by the accumulation whatever
        # `scale_wrt_gas` says, unless the loss is a tensor computed from it (0.19.8).
        finite = loss.detach().isfinite()
        factor = torch.where(finite if len(self._norm.norms) == 1 else torch.ones_like(finite), divisor, math.nan)
        self._deepspeed.backward(loss * factor, scale_wrt_gas=False)
        self.losses = [*(self.losses if self._micro_batches else []), loss.detach()]
        self._micro_batches += 1
        if not self.is_boundary:
            self._deepspeed.step()  # only counts the micro-batch

    def step(self, live: frozenset[str], lr: float, measure: bool = False) -> None:
        """Update the weights of the live keys (sgtm/model/rows.py); all others stay as they are, everything if none is.

        measure  whether `key_norms` will be called
        If the global gradient or a loss is not finite nothing changes, moments and counts neither, and `finite` is
        False. With `grad_clip_scope: owner`, that is so for each owner by itself.
        """
        if not self.is_boundary:
            raise RuntimeError(f"step called after {self._micro_batches} of {self.accumulation} micro-batches")
        enter("optimizer")
        self.optimizer.begin_step(live, lr, measure)
        if self._plain and not math.isfinite(self._takeover.plain_norm()):
            self.optimizer.begin_step(live=frozenset(), lr=0.0)
        self._deepspeed.step()
        self._micro_batches = 0
        if not self.finite and self.config.distributed.offload_optimizer and not self._plain:
            # In ZeRO 1 and 2 in bf16 the next gradient would be added to this one (0.19.8).
            self._deepspeed.optimizer.averaged_gradients.clear()

    def _set_factors(self) -> float:
        """Factors of the coming update by owner; the norm, or infinity if there is none that can be updated."""
        limit, norms = self.config.optimizer.grad_clip, self._norm.norms
        self.optimizer.factors = [
            (float(np.float32(min(1.0, limit / (norm + 1e-6)))) if limit else 1.0) if math.isfinite(norm) else None
            for norm in norms
        ]
        return math.hypot(*filter(math.isfinite, norms)) if any(map(math.isfinite, norms)) else math.inf

    @property
    def finite(self) -> bool:
        """Whether the last step's gradient and losses were finite, on all ranks; where not, it has changed nothing.

        With `grad_clip_scope: owner`: whether the gradients of all owners were, whatever the losses are; those whose
        gradients were not are unchanged.
        """
        return self._norm.finite

    @property
    def skipped(self) -> tuple[str, ...]:
        """Groups whose update the last step skipped; `retain` stands for the joint parameters too."""
        groups, norms = self.config.space.groups, self._norm.norms
        if len(norms) == 1:
            return () if self.finite else groups
        return tuple(group for group, norm in zip(groups, norms, strict=True) if not math.isfinite(norm))

    @property
    def stopping(self) -> bool:
        """Whether the stop flag was set on any rank when the last step's gradient was complete; the same on all."""
        return self._norm.stopping

    def stop_if(self, flag: Callable[[], bool]) -> None:
        """Read this rank's stop flag in every step. It travels in a reduction that the step has in any case."""
        self._norm.stop = flag

    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping; infinite where that was not finite."""
        return self._norm.norm

    def clip_factor(self) -> torch.Tensor:
        """What the last step's gradient was multiplied by to be clipped: fp32 scalar up to 1 in the host's memory.

        With `grad_clip_scope: owner`: that of the retain group and the joint parameters; 1 where they were skipped.
        """
        return torch.tensor(1.0 if self.optimizer.factors[0] is None else self.optimizer.factors[0])

    def key_norms(self) -> dict[str, float]:
        """L2 norm by key of the last step's gradient, before clipping; a collective call, after `step(measure=True)`.

        One vector over the keys is summed over the ranks, no gradient is gathered. Infinite where it was not finite.
        """
        keys, squares = self.optimizer.steps, self.optimizer.squares
        if len(self.skipped) == len(self.config.space.groups):
            return dict.fromkeys(keys, math.inf)
        if squares is None:
            raise RuntimeError("key_norms called after a step without measure=True")
        total = squares if self._plain else self.all_reduce_sum(squares)  # of replicas every rank has the whole
        norms = (norm if math.isfinite(norm) else math.inf for norm in total.sqrt().tolist())
        return dict(zip(keys, norms, strict=True))

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, as a new tensor on the engine's device."""
        total = tensor.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def save(self, directory: Path, step: int, state: dict) -> None:
        """Copy the weights, the optimizer and `state`, and begin to write them into the existing `directory`.

        In DeepSpeed's layout, with what its conversion to a universal checkpoint needs. Training may continue at once;
        `saved` waits for the files and must be called before the next `save`.
        step   global steps trained: DeepSpeed's own counts include dry runs and begin at 0 after `load`
        state  comes back from `load`; rank 0's counts. The optimizer's counts by key travel with it.
        """
        self._deepspeed.global_steps = step
        self._deepspeed.global_samples = step * self._deepspeed.train_batch_size()
        client_state = {"sgtm": {"state": state, "optimizer_steps": self.optimizer.steps}, **universal_info()}
        with _quiet():
            self._deepspeed.save_checkpoint(
                str(directory.parent), tag=directory.name, client_state=client_state, save_latest=False
            )
        self._writer.begin()

    @property
    def saving(self) -> bool:
        """Whether this rank is writing what `save` has copied."""
        return self._writer.busy

    def saved(self) -> dict[str, dict]:
        """Wait for the files that `save` began: name -> {"bytes", "sha256"}, of all ranks.

        Every rank raises the OSError of any.
        """
        return {name: entry for files in on_every_rank(self._writer.end) for name, entry in files.items()}

    @torch.no_grad()
    def load(self, directory: Path) -> dict:
        """Take over what `save` wrote, in any stage and on any number of ranks; returns its `state`.

        Weights are of this engine's precision, rounded from the fp32 weights that were saved.
        """
        stored = Stored(directory)
        gathered = getattr(self._deepspeed.optimizer, "persistent_parameters", [])  # small ones, after a ZeRO 3 step
        if gathered:
            gathered[0].partition(gathered)
        parameters = dict(self.module.named_parameters())
        for f in self._fragments:
            owned = slice(f.offset, f.offset + f.end - f.start)
            tensors = [f.tensor, *(self.optimizer.state[f.tensor][part] for part in STATE_TENSORS[1:])]
            for part, tensor in zip(STATE_TENSORS, tensors, strict=True):
                tensor.reshape(-1)[owned] = stored.read(f.name, part, f.start, f.end).to(tensor.device)
            sharded = getattr(parameters[f.name], "ds_tensor", None)
            if sharded is not None:
                sharded.view(-1)[: f.end - f.start] = f.tensor.reshape(-1)[owned]
        for name, parameter in parameters.items():
            if not hasattr(parameter, "ds_tensor"):
                parameter.copy_(stored.read(name, "fp32").view(parameter.shape))
        for name, buffer in self.module.named_buffers():
            if name in stored.buffers:
                buffer.copy_(stored.buffers[name])
        if hasattr(self._deepspeed.optimizer, "invalidate_secondary_tensor"):  # of hpZ: copies of the weights before
            self._deepspeed.optimizer.invalidate_secondary_tensor()
        counts = stored.client["optimizer_steps"]  # under our own keys: pickle writes one object once, equal ones twice
        self.optimizer.steps = {key: counts[key] for key in self.optimizer.steps}
        return stored.client["state"]


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed without what it prints, and without the warning that it does not know our optimizer."""
    logger = logging.getLogger("DeepSpeed")

    def unknown(record: logging.LogRecord) -> bool:
        return "untested optimizer" not in record.getMessage()

    logger.addFilter(unknown)
    try:
        with redirect_stdout(None):
            yield
    finally:
        logger.removeFilter(unknown)
