"""What a step sends and reads besides gradients and weights, in every ZeRO stage, and gradients sent in bf16.

The stages reduce and clip as sgtm/distributed/takeover.py has them do.
A read is a number that the host takes out of a tensor: on a GPU it waits for the device there.
"""

from __future__ import annotations

import math
import sys

import pytest
import torch
from dist.test_engine import expected_gradient, train_one
from engines import new_engine, train
from families import model_of, random_step, run_config
from ranks import run_ranks
from tiny import FORGET, MIXED, STAGES, tiny_config, tiny_model, tiny_step
from torch.utils._python_dispatch import TorchDispatchMode

from sgtm.model.rows import live_keys
from sgtm_kernels.cross_entropy.pytorch import ROWS

SENT = [(0, "fp32", False), (1, "bf16", False), (2, "bf16", False), (2, "fp32", True), (3, "bf16", False)]
WHOLE = 20  # elements: more are gradients or weights


class Watched(TorchDispatchMode):
    """Reads by the host, and all-reduces of a few numbers. Moves to the CPU count, which are nothing on a CPU."""

    READS = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default

    def __init__(self, monkeypatch):
        super().__init__()
        self.reads = self.small = 0
        for name in ("tolist", "cpu", "numpy", "to"):
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name: str, inner):
        def method(tensor, *args, **kwargs):
            ours = sys._getframe(1).f_globals["__name__"].startswith("sgtm")  # DeepSpeed's "cpu" is the device's name
            self.reads += name == "tolist" or (ours and (name != "to" or "cpu" in (*args, *kwargs.values())))
            return inner(tensor, *args, **kwargs)

        return method

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func in self.READS
        if func is torch.ops.c10d.allreduce_.default:
            self.small += sum(t.numel() for t in torch.utils._pytree.tree_leaves(args[0])) <= WHOLE
        return func(*args, **(kwargs or {}))


def host_waits(*args):
    raise AssertionError("the host waits for the device")


def watch_steps() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch_cases(monkeypatch)


def watch_cases(monkeypatch) -> None:
    from deepspeed.accelerator import get_accelerator

    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.loop import StopSignal

    any_config = tiny_config()
    init_distributed(any_config.distributed, any_config.kernels)
    for stage, precision, offload in STAGES:
        case = f"ZeRO {stage} {precision}{' offloaded' * offload}"
        sections = {"optimizer": {"grad_clip": 0.1}, "distributed": {"offload_optimizer": offload}}
        config = tiny_config(stage, precision, **sections)
        engine, signal = Engine(tiny_model(config), config), StopSignal()
        flagged: list[int] = []
        engine.stop_if(lambda flagged=flagged, engine=engine: engine.rank in flagged)
        monkeypatch.setattr(get_accelerator(), "synchronize", host_waits)
        for step, ranks in enumerate([[], [1], [0, 1], []]):
            flagged[:] = ranks
            backward = []
            for batch in tiny_step(config, step, MIXED, engine.rank, engine.world_size):
                loss, _ = engine(*batch)
                with pytest.MonkeyPatch.context() as patch, Watched(patch) as watched:
                    engine.backward(loss)
                backward.append(watched.reads)
            assert backward[-1] == backward[0], f"{case}: {backward} reads, more in the last micro-batch"
            with pytest.MonkeyPatch.context() as patch, Watched(patch) as watched:
                engine.step(live_keys(config.tables, MIXED), 1e-2)
                assert signal.anywhere(engine) == bool(ranks), f"{case}, step {step}"
            assert engine.finite and engine.clip_factor() < 1
            # ZeRO 3 looks at the norm once more, which lies in the host's memory by then.
            assert watched.reads == (2 if stage == 3 else 1), f"{case}: {watched.reads} reads"
            # In ZeRO 0 in fp32 the flag has gone with the gradients.
            assert watched.small == (0 if stage == 0 and precision == "fp32" else 1), f"{case}: {watched.small} sent"


def test_a_step_reduces_once_and_reads_once_besides_gradients_and_weights():
    run_ranks(watch_steps, 2)


def count_reads() -> None:
    """Of whole training steps, after the first: ZeRO 3 traces its gathers there."""
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed
    from sgtm.training.step import StepTotals, train_step

    any_config = run_config(0, "gpt_neo", "torch", "sequence")
    init_distributed(any_config.distributed, any_config.kernels)
    for stage in (0, 1, 2, 3):
        config = run_config(stage, "gpt_neo", "torch", "micro")
        engine = Engine(model_of("gpt_neo"), config)
        totals = StepTotals(len(config.tables.labels), engine.device)
        for step in range(3):
            batches = random_step("micro", step)[engine.rank :: engine.world_size]
            with pytest.MonkeyPatch.context() as patch, Watched(patch) as watched:
                train_step(engine, batches, config.tables, 1e-2, totals)
            # On a CPU alone, the cross-entropy looks at all targets, and at the probabilities of each block of rows.
            on_a_cpu = sum(1 + math.ceil(batch.targets.numel() / ROWS) for batch in batches)
            on_a_cpu += len(batches)  # what is counted of targets, which come from the host
            allowed = on_a_cpu + (2 if stage == 3 else 1)
            assert step == 0 or watched.reads == allowed, f"ZeRO {stage}, step {step}: {watched.reads} reads"
        # Each label is on one rank alone, and all are in the step.
        assert set(engine.optimizer.steps.values()) == {3}, f"ZeRO {stage}: {engine.optimizer.steps}"


def test_reads_of_a_whole_step():
    run_ranks(count_reads, 2)


def send_in_bf16() -> None:
    from sgtm.distributed.engine import Engine
    from sgtm.distributed.process_group import init_distributed

    any_config = tiny_config()
    init_distributed(any_config.distributed, any_config.kernels)
    for stage, precision, offload in SENT:
        case, errors = f"ZeRO {stage} {precision}{' offloaded' * offload}", {}
        for communication in ("fp32", "bf16"):
            distributed = {"offload_optimizer": offload, "communication": communication}
            config = tiny_config(stage, precision, optimizer={"grad_clip": 0.0}, distributed=distributed)
            engine = Engine(tiny_model(config), config)
            engine._takeover.bucket = 100  # several pieces of a share
            _, gradient = train_one(engine, 0)
            expected = expected_gradient(config, precision)
            errors[communication] = max(
                float((gradient[name] - values).abs().max() / values.abs().max()) for name, values in expected.items()
            )
        # A gradient of bf16, or a sum of two, is off by half of its last of 8 bits; four micro-batches add up.
        assert errors["fp32"] < 2e-6 < 1e-4 < errors["bf16"] < 2**-7, f"{case}: {errors}"
        frozen = engine.optimizer.steps.keys() - live_keys(config.tables, (FORGET,))
        before = weights(engine, frozen)
        train(engine, [1])  # forget tokens alone
        assert before and all(map(torch.equal, before, weights(engine, frozen))), f"{case}: frozen weights moved"
        losses = [train(Engine(tiny_model(config), config), range(3)) for _ in range(2)]
        assert losses[0] == losses[1], f"{case}: not the same run again"


def weights(engine, keys) -> list[torch.Tensor]:
    tables = engine.optimizer.tables
    return [
        tensor.detach().reshape(-1)[start:end].clone()
        for tensor, table in tables.items()
        for start, end, key, _ in table
        if key in keys
    ]


def test_gradients_sent_in_bf16_are_rounded_and_nothing_else():
    run_ranks(send_in_bf16, 2)


class Stream:
    """Of a device that is not there: who waits for it, without keeping the host."""

    waits = 0

    def wait_stream(self, other) -> None:
        Stream.waits += 1


def overlap(hop: int) -> None:
    """Two steps in ZeRO 2 with the accelerator's streams stood in for; DeepSpeed would have the host wait for them."""
    from deepspeed.accelerator import get_accelerator

    from sgtm.config import sections

    accelerator, config = get_accelerator(), tiny_config(2, "bf16")
    sections.HOP_BYTES = hop
    expected = train(new_engine(config), range(2))
    engine, main = new_engine(config), Stream()
    zero = engine._deepspeed.optimizer
    assert zero.overlap_comm and zero.use_multi_rank_bucket_allreduce == (hop > 0)
    zero.reduction_stream = Stream()
    zero.reduce_bucket_size = 200  # several reductions in a backward pass
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(accelerator, "resolves_data_dependency", lambda: False)
        monkeypatch.setattr(accelerator, "current_stream", lambda *args: main)
        monkeypatch.setattr(accelerator, "synchronize", host_waits)
        recorded = []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(tensor.numel()))
        before = Stream.waits
        assert train(engine, range(2)) == expected
    assert Stream.waits - before > 2 * engine.accumulation * 2, "streams do not wait for one another"
    whole = 2 * engine.accumulation * sum(p.numel() for p in engine.module.parameters())
    assert sum(recorded) >= 2 * whole, "gradients, and their sums, are freed while they are read"


def both_ways() -> None:
    for hop in (0, 10**6):
        overlap(hop)


def test_streams_wait_for_one_another_and_no_host_for_them():
    """Each share to its owner, as in a large model, and all-reduced."""
    run_ranks(both_ways, 2)


def test_deepspeed_config():
    from sgtm.distributed.engine import deepspeed_config

    for stage in range(4):
        settings = deepspeed_config(tiny_config(stage, "bf16"), 2, 100)
        assert settings["communication_data_type"] == "fp32" and settings["gradient_clipping"] == 0.0
        zero = settings["zero_optimization"]
        assert zero["overlap_comm"] == (stage >= 2) and zero["use_multi_rank_bucket_allreduce"] is True
        for ranks, numel, all_reduced in ((2, 10**6, False), (8, 10**7, True), (8, 10**8, False), (512, 10**9, True)):
            config = tiny_config(stage, "bf16", train={"tokens_per_step": 6 * 1024})
            zero = deepspeed_config(config, ranks, numel)["zero_optimization"]
            assert zero["use_multi_rank_bucket_allreduce"] is all_reduced
    config = tiny_config(2, distributed={"communication": "bf16"})
    assert deepspeed_config(config, 2, 100)["communication_data_type"] == "bf16"
