"""A model of the time of a step, and of the machine it runs on. Assumptions, not measurements.

    compute        FLOPs of the model, and those of recomputed blocks, over the ranks' peak times `reached`
    communication  a ring over all ranks goes through the network inside each node and, once for each node, through the
                   one between nodes; the slower of the two sets the pace, at its bandwidth times `sustained`
    step           one after the other, in every stage: the assumption that stages are compared under
    best_step      what the engine sends while the ranks compute takes no time of its own, as far as the computation
                   lasts: the reduction of gradients in ZeRO 2, and all that ZeRO 3 sends (DeepSpeed's overlap_comm).
                   ZeRO 0 and 1 send after the last micro-batch, so theirs is `step`

A run lies between the two; where depends on bandwidth left beside the computation, which nothing here measures.
Left out: latency, the optimizer's own time, the input, evaluations, and what masks save. Model FLOP utilisation is the
model's FLOPs alone over the peak (sgtm/estimate/shapes.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from sgtm.config.schema import Config
from sgtm.estimate.shapes import model_flops, recomputed_flops
from sgtm.estimate.traffic import Collective

# Dense TFLOP/s by precision and memory of one H100 SXM, NVLink and InfiniBand in one direction: NVIDIA's data sheets of
# the H100 (989.4 bf16; 67 fp32 without tensor cores; 80 GB; NVLink 900 GB/s both ways) and of the DGX H100 (eight
# network cards of 400 Gb/s a node).
PEAK = {"bf16": 989.4, "fp32": 67.0}


@dataclass(frozen=True)
class Machine:
    """Where a run is to go.

    nodes, gpus  number of nodes, and of GPUs in each
    memory       of a GPU, GB (1e9 bytes)
    tflops       peak of a GPU, dense; None: the H100's for the precision of the run
    inside       bandwidth of one GPU to the others of its node, one direction, GB/s
    between      bandwidth of a whole node to the others, one direction, GB/s
    reached      share of the peak that a step reaches while it computes; assumed
    sustained    share of a bandwidth that collectives reach; assumed
    """

    nodes: int = 1
    gpus: int = 1
    memory: float = 80.0
    tflops: float | None = None
    inside: float = 450.0
    between: float = 400.0
    reached: float = 0.5
    sustained: float = 0.8

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Speed:
    """Of one step: bytes by network, and seconds.

    inside   bytes that one GPU sends to others of its node, mean over the GPUs
    between  bytes that one node sends to others
    step     with nothing hidden; tokens_per_second and utilisation are of it
    """

    inside: float
    between: float
    compute: float
    communication: float
    step: float
    best_step: float
    tokens_per_second: float
    utilisation: float


@dataclass(frozen=True)
class Duration:
    """Of all steps of a run, by the time of one.

    gpu_hours  of all GPUs together
    """

    days: float
    gpu_hours: float


def duration(config: Config, machine: Machine, step: float) -> Duration:
    """Of the run, where a step takes `step` seconds."""
    hours = config.train.steps * step / 3600
    return Duration(days=hours / 24, gpu_hours=machine.ranks * hours)


def speed(config: Config, machine: Machine, moved: list[Collective]) -> Speed:
    sent = sum(collective.sent(machine.ranks) for collective in moved)
    behind = sum(collective.sent(machine.ranks) for collective in moved if collective.overlapped)
    crossing = sent if machine.nodes > 1 else 0.0  # of a ring's ranks one of each node sends to the next node
    within = sent if machine.gpus > 1 else 0.0
    paths = (within / machine.inside, crossing / machine.between)
    communication = max(paths) / (machine.sustained * 1e9)
    hidden = communication * behind / sent if sent else 0.0
    peak = 1e12 * (machine.tflops or PEAK[config.train.precision]) * machine.ranks
    flops = model_flops(config.model) * config.train.tokens_per_step
    again = recomputed_flops(config.model) * config.train.tokens_per_step
    compute = (flops + again) / (peak * machine.reached)
    step = compute + communication
    mean_within = sent * (machine.gpus - 1) / machine.gpus if machine.nodes > 1 else within
    return Speed(
        inside=mean_within,
        between=crossing,
        compute=compute,
        communication=communication,
        step=step,
        best_step=max(compute, hidden) + communication - hidden,
        tokens_per_second=config.train.tokens_per_step / step,
        utilisation=flops / (peak * step),
    )
