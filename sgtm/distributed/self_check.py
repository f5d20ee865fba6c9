"""The self-check of a run's kernels, before its first step.

`check_kernels` builds one small layer of every kind in the model, runs a forward pass under every mask of training, and
`sgtm_kernels.selfcheck` repeats each call on the backend. Under `auto`, an op that fails falls back to PyTorch, with
one warning; with a named backend it raises. A pass is cached by device, driver, torch, Triton and code (`$SGTM_CACHE`,
else `~/.cache/sgtm`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from sgtm.config import Config
from sgtm.data.random_data import label_pieces, random_batch
from sgtm.distributed.env import DTYPES, device_type, kernel_backend
from sgtm.distributed.on_ranks import on_every_rank
from sgtm.masking.partition import LayerPartition
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Block, Transformer
from sgtm_kernels import dispatch
from sgtm_kernels.selfcheck import Call, Passed, check, record_op_calls

SEQUENCES, TOKENS, LABELS = 4, 160, 4  # of the small batches, at most; the labels of further domains are masked alike
WIDEST = 512  # window that sequences are made longer for


def check_kernels(config: Config, run: Callable[[Callable], list] = on_every_rank) -> list[str]:
    """Check the run's kernels; returns one warning for each op that falls back.

    run  calls its argument and returns the results of all ranks; the default is collective, after `init_distributed`
    Raises ValueError if the backend was named and one of its ops fails, or if a kernel has broken the device.
    """
    backend = kernel_backend(config.kernels, config.train.precision)
    if backend != "triton":
        return []
    problems: dict[str, str] = {}
    for of_rank in run(lambda: self_check(config, backend)):
        problems |= {op: problem for op, problem in of_rank.items() if problem is not None}
    if problems and dispatch.named(config.kernels.backend):
        raise ValueError(
            f"kernel backend {backend!r} was requested, but on this device it fails its self-check:\n  "
            + "\n  ".join(problems.values())
            + "\nkernels.backend auto takes PyTorch for these ops alone, torch for all"
        )
    for op in problems:
        dispatch.fall_back(op, backend)
    return [
        f"warning: {problem}: the kernel fails its self-check on this device; PyTorch takes its place, and "
        f"`sgtm doctor --check` repeats the check"
        for problem in problems.values()
    ]


def self_check(config: Config, backend: str, repeat: bool = False) -> dict[str, str | None]:
    """For each op that the run launches, what is wrong with it on this device, or None.

    repeat  also ops that passed before
    Raises ValueError where a kernel has broken the device.
    """
    device = torch.device(device_type())
    calls = calls_of(config, device)
    passed = Passed(cache_folder(), calls, backend, device)
    if passed and not repeat:
        return dict.fromkeys((*dict.fromkeys(call.op for call in calls), "adamw"))
    try:
        problems = check(calls, backend, device)
    except RuntimeError as error:
        raise ValueError(f"{error}; take PyTorch instead: kernels.backend torch") from error
    if not any(problems.values()):
        passed.keep()
    return problems


def cache_folder() -> Path:
    return Path(os.environ.get("SGTM_CACHE") or Path.home() / ".cache" / "sgtm") / "self-check"


def calls_of(config: Config, device: torch.device) -> list[Call]:
    """Calls of ops in small forward passes of this config's layers: one for each kind of mask in training, and those
    of evaluations, with nothing and with every domain removed."""
    small = _small(config)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    with device:
        model = Transformer(small.model.model_copy(update={"layers": 0}), small.partition, "reference")
        model.blocks.extend(Block(small.model, small.partition, i, "reference") for i in _kinds(config))
    for block in model.blocks.parameters():
        if block.dim() == 2:
            torch.nn.init.normal_(block, std=config.model.init_std)
    model.to(DTYPES[config.train.precision])
    with record_op_calls() as calls:
        for i, labels in enumerate(label_pieces(small, min(len(config.tables.labels), LABELS))):
            batch = random_batch(small, labels, i)
            model(*batch.on(device, config.tables), 1.0 / batch.targets.numel())
        with torch.no_grad():
            for removed in ((), config.space.domains):
                model(*batch.on(device, removal_tables(config.space, removed)), 1.0 / batch.targets.numel())
    torch.random.set_rng_state(state)
    return calls


def _small(config: Config) -> Config:
    """The config with few and short sequences; widths, groups and vocabulary as they are."""
    config = config.for_ranks(1)
    windows = [window for i in range(config.model.layers) if (window := config.model.window_of(i)) is not None]
    longest = max([TOKENS, *(window + TOKENS // 2 for window in windows if window <= WIDEST)])
    context, sequences = min(config.model.context, longest), min(config.micro_batch, SEQUENCES)
    tokens = {"micro_batch": sequences, "tokens_per_step": sequences * context}
    model = config.model.model_copy(update={"context": context, "activation_checkpointing": False})
    return config.model_copy(update={"model": model, "train": config.train.model_copy(update=tokens)})


def _kinds(config: Config) -> list[int]:
    """The first layer of every kind: partition and window."""
    first: dict[tuple[LayerPartition, int | None], int] = {}
    for i in range(config.model.layers):
        first.setdefault((config.partition.layers[i], config.model.window_of(i)), i)
    return list(first.values())
