"""The training loop.

A run is a pure function of its config: the data order follows from (seed, step), the learning rate from the step, the
initial weights from the seed. What a checkpoint holds besides weights and moments is therefore small, and a resumed run
is bitwise the uninterrupted one on the same number of ranks (tests/e2e/test_resume.py).
"""

from __future__ import annotations

import math
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from sgtm.config import Config
from sgtm.config.reference import flat
from sgtm.data.loader import Loader, check_domains_trained, only_forget
from sgtm.data.store import Corpus
from sgtm.data.summary import ONLY_FORGET, trained_categories
from sgtm.distributed.engine import Engine
from sgtm.distributed.on_ranks import check_same, on_rank_zero, together
from sgtm.distributed.process_group import init_distributed
from sgtm.distributed.segments import full_numel
from sgtm.distributed.self_check import check_kernels
from sgtm.distributed.watchdog import enter
from sgtm.evaluation.losses import evaluate
from sgtm.masking.certificate import certified, check_certified
from sgtm.model.direction import direction_of
from sgtm.model.output_norms import OutputNorms
from sgtm.model.transformer import Transformer
from sgtm.process.ranks import RankInfo
from sgtm.process.signals import SIGNALS, Stopped
from sgtm.run.checkpoint import read_manifest, resolved
from sgtm.run.directory import LEASE, begin, locked_run
from sgtm.run.evaluate import check_held_out
from sgtm.run.metrics import MetricsLog
from sgtm.run.resume import find_whole, load_checkpoint, resume_command
from sgtm.run.saving import CheckpointWriter
from sgtm.run.usable import check_usable
from sgtm.training.contention import ContentionWatch
from sgtm.training.skipped import describe_skipped
from sgtm.training.start import dry_run, export_record, initial_model, open_everywhere
from sgtm.training.step import StepTotals, group_norms, learning_rate, probe, train_step
from sgtm.words import counted
from sgtm_kernels.dispatch import served

OWN = ("data.path", "runs", "train.init_from", "steering.direction")
"""Paths, which may differ between nodes; what they hold is compared."""


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Train, or resume, a run; returns its directory `<runs>/<name>`.

    resume     resume from the newest valid checkpoint of the run directory; from the beginning if it has none at all
    overwrite  delete an existing run directory first

    SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint after the step in progress, or in the middle of an evaluation, and
    raise `Stopped` once the run is closed. Raises ValueError for what a user can put right: a run directory that
    exists, that another process trains in or that is not the same for all ranks, settings that are not, data that do
    not fit the config, checkpoints of which none is whole, wandb without a login. Then no run directory has been made,
    and none deleted.
    """
    rank_info = init_distributed(config.distributed, config.kernels)
    check_same(lambda: _settings(config) | {"--resume": resume, "--overwrite": overwrite})
    run = Path(config.runs) / config.name
    on_rank_zero(lambda: check_usable(run, resume, overwrite))
    with locked_run(run, LEASE if resume else 0.0):
        stopped_by = _train(config, rank_info, run, resume, overwrite)
    if stopped_by is not None:
        raise Stopped(stopped_by)
    return run


def _settings(config: Config) -> dict[str, Any]:
    """What all ranks must share. Corpus and run directory are compared by what they hold, wandb is rank 0's alone."""
    values = flat(resolved(config)).items()
    return {key: value for key, value in values if key not in OWN and not key.startswith("wandb.")}


def _train(config: Config, rank_info: RankInfo, run: Path, resume: bool, overwrite: bool) -> int | None:
    """The signal that has stopped the run, if one has."""
    written, config = config, together(lambda: config.for_ranks(rank_info.world_size))
    steering = together(lambda: direction_of(config))
    direction = steering.sha256 if steering else None
    if rank_info.world_size > 1:
        check_same(lambda: {"SHA-256 of steering.direction": direction})
    notes: list[str] = []
    enter("verifying the checkpoint", 0)
    latest = find_whole(run, rank_info.rank, rank_info.world_size, notes.append) if resume else None
    enter("checking the kernels", 0)
    notes += check_kernels(config)
    enter("compiling" if config.train.compile == "blocks" else "making the model")
    model, weights = _initial_model(config, rank_info, load=latest is None)
    engine = Engine(model, config)
    engine.set_weights(weights)
    del weights
    began = time.perf_counter()
    dry_run(engine, config.tables)
    warm_up = time.perf_counter() - began
    enter("opening the corpus")
    corpus = open_everywhere(config, rank_info)
    init_from = config.train.init_from
    if latest is None and init_from:
        from sgtm.hf.pretrained import check_tokenizer

        on_rank_zero(lambda: check_tokenizer(init_from, corpus))
    initial = on_rank_zero(lambda: export_record(config)) if latest is None else None
    trained_on = trained_categories(corpus), bool(len(corpus.spans)), initial
    check_certified(config.conditions, *trained_on)
    check_held_out(corpus, config)
    check_domains_trained(corpus, config)
    loader = Loader(corpus, config, rank_info.rank, rank_info.world_size)
    totals = StepTotals(len(config.space.labels), engine.device)
    start = 0
    if latest is not None:
        enter("loading the checkpoint")
        start, progress, reshaped = load_checkpoint(engine, latest, config, corpus.fingerprint, direction)
        totals.restore(progress, rank_info.rank, rank_info.world_size)
        notes += [reshaped] if reshaped else []
    enter("opening the run directory")
    log = MetricsLog(run, config, rank=engine.rank, start=start)
    evaluated = on_rank_zero(lambda: begin(run, written, log, resume, overwrite))
    with StopSignal() as stop, log:
        engine.stop_if(lambda: stop.received)
        for note in notes:
            log.print(note)
        log.print(_arithmetic(config, engine, start, warm_up))
        if only_forget(corpus, config):
            log.print(f"warning: {ONLY_FORGET}")
        if start == config.train.steps:
            log.print(f"{run} is complete: all of its {start} steps were trained before")
        if resume and not start:
            log.print(f"{run} has no checkpoint: training from the beginning")
        independent_of = certified(config.conditions, *trained_on)
        if latest is not None:  # what was trained before may have been another
            before = on_rank_zero(lambda: read_manifest(latest)["independent_of"])
            independent_of = tuple(domain for domain in independent_of if domain in before)
        writer = CheckpointWriter(engine, run, config, corpus.fingerprint, independent_of, log.sync, direction)
        due = start and _evaluation_due(config, start) and start not in evaluated
        if due and not _evaluate(engine, corpus, config, log, stop, start):
            log.print(_stopped(run, engine, start, config.train.steps, "the evaluation after step"))
        else:
            _steps(config, run, engine, loader, corpus, log, stop, totals, start, writer)
    enter(None)
    return stop.number


def _steps(
    config: Config,
    run: Path,
    engine: Engine,
    loader: Loader,
    corpus: Corpus,
    log: MetricsLog,
    stop: StopSignal,
    totals: StepTotals,
    start: int,
    writer: CheckpointWriter,
) -> None:
    space, every = config.space, config.train
    seconds, logged = log.seconds, start
    by_itself = engine.world_size == 1 and engine.device.type == "cpu"  # else the main thread waits for others anyway
    contention = ContentionWatch(torch.get_num_threads() if by_itself else 1)
    for step in range(start, every.steps):
        began = time.perf_counter()
        enter("data", step + 1)
        lr = learning_rate(step, config.optimizer, every.steps)
        batches, done = loader.step(step), step + 1
        last = done == every.steps
        log_due = done % every.log_every == 0 or last
        if every.probe_every and done % every.probe_every == 0:
            paused = time.perf_counter()
            log.probe(done, probe(engine, batches, config.tables))
            began += time.perf_counter() - paused
        norms = OutputNorms(config.tables) if log_due else None
        with contention.step():
            train_step(engine, batches, config.tables, lr, totals, log_due, norms)
        if text := contention.warning():
            log.print(f"warning: {text}")
        if not engine.finite:
            log.checkpoint(writer.finish())  # the run may end here
            log.print(describe_skipped(engine, loader, corpus, config, run, step, totals.in_a_row))
        stopping = stop.anywhere(engine) and not last
        seconds += time.perf_counter() - began
        if norms is not None:
            elapsed, tokens = seconds - log.seconds, (done - logged) * every.tokens_per_step
            logged = done
            log.step(
                {
                    "step": done,
                    "tokens": done * every.tokens_per_step,
                    "seconds": seconds,
                    **_losses(totals, engine, space.labels),
                    "lr": lr,
                    **{f"lr/{group}": lr * rate for group, rate in config.optimizer.group_lr.items()},
                    **_gradients(totals, engine, space.groups),
                    "tokens_per_second": tokens / elapsed,
                    "skipped_steps": totals.skipped,
                    "norms": norms.take(engine.all_reduce_sum),
                }
            )
        enter("checkpoint")
        log.checkpoint(writer.poll())
        due = every.checkpoint_every and done % every.checkpoint_every == 0
        saving = last or stopping or (due and not totals.in_a_row)  # the ones from before the skipped steps are kept
        if saving:
            _save(writer, log, done, totals, close=last or stopping)
        where = "step"
        if not stopping and _evaluation_due(config, done):
            stopping, where = not _evaluate(engine, corpus, config, log, stop, done), "the evaluation after step"
            if stopping:
                enter("checkpoint")
                log.checkpoint(writer.close()) if saving else _save(writer, log, done, totals, close=True)
        if stopping:
            log.print(_stopped(run, engine, done, every.steps, where))
            return
    log.print(f"done: {run}")


def _save(writer: CheckpointWriter, log: MetricsLog, done: int, totals: StepTotals, close: bool) -> None:
    for saved in writer.start(done, totals.state()):
        log.checkpoint(saved)
    if close:
        log.checkpoint(writer.close())


def _stopped(run: Path, engine: Engine, done: int, steps: int, where: str) -> str:
    where = f"after {where}" if where == "step" else f"in {where}"
    command = resume_command(run, engine.world_size)
    return f"stopped by a signal {where} {done} of {steps}, checkpoint saved; continue: {command}"


def _evaluation_due(config: Config, done: int) -> bool:
    every = config.train.eval_every
    return done == config.train.steps or (every > 0 and done % every == 0)


def _losses(totals: StepTotals, engine: Engine, labels: tuple[str, ...]) -> dict[str, float]:
    """Mean loss over all targets and by applied label, of the labels that occurred; NaN if there was none, or in
    skipped steps alone."""
    sums, counts = totals.take(engine)
    if not counts.any():
        return {"loss": math.nan}
    by_label = {f"loss/{name}": s / n for name, s, n in zip(labels, sums.tolist(), counts.tolist(), strict=True) if n}
    return {"loss": float(sums.sum() / counts.sum()), **by_label}


def _gradients(totals: StepTotals, engine: Engine, groups: tuple[str, ...]) -> dict[str, float]:
    """The gradient's norm, in all and by group, in the step just done, and how it was clipped since the last line."""
    whole, clipped = engine.grad_norm(), totals.take_clipping()
    norms = group_norms(engine.key_norms(), groups)
    return {
        "grad_norm": whole,
        **{f"grad_norm/{group}": norm for group, norm in norms.items()},
        **{f"grad_share/{group}": (norm / whole) ** 2 if whole else 0.0 for group, norm in norms.items()},
        "clipped": clipped[0],
        "clip_factor": clipped[1],
    }


def _evaluate(engine: Engine, corpus: Corpus, config: Config, log: MetricsLog, stop: StopSignal, step: int) -> bool:
    """Evaluate and log it; False, and no line, where a signal came before the end."""
    try:
        evaluation = evaluate(
            engine,
            corpus,
            config,
            split="test",
            sequences=config.train.eval_limit,
            device=engine.device,
            rank=engine.rank,
            world_size=engine.world_size,
            all_reduce_sum=engine.all_reduce_sum,
            check=lambda: stop.check(engine),
        )
    except Stopped:
        return False
    log.evaluation(step, *evaluation)
    return True


def _checksum(weights: dict[str, torch.Tensor]) -> int:
    """CRC-32 of all bytes, by name."""
    checksum = 0
    for name in sorted(weights):
        array = weights[name].detach().contiguous().view(torch.uint8).numpy()
        checksum = zlib.crc32(array.data, zlib.crc32(name.encode(), checksum))
    return checksum


def _initial_model(config: Config, rank_info: RankInfo, load: bool) -> tuple[Transformer, dict[str, torch.Tensor]]:
    """The model before the first step, and its weights that are not random: those of `train.init_from`, if `load`."""
    model = initial_model(config)
    folder = config.train.init_from
    theirs: dict[str, torch.Tensor] = {}
    if load and folder:
        from sgtm.hf.pretrained import load_pretrained  # transformers takes seconds to import

        theirs = together(lambda: load_pretrained(folder, config.model, config.partition))
        if rank_info.world_size > 1:
            check_same(lambda: {"checksum of train.init_from": _checksum(theirs)})
        model.load_state_dict({p.name: getattr(model, p.name) for p in model.domain_parts} | theirs)
    return model, theirs


def _arithmetic(config: Config, engine: Engine, start: int, warm_up: float) -> str:
    """What is trained, on what; warm_up: seconds of the dry run."""
    t, ranks = config.train, engine.world_size
    parameters = sum(full_numel(p) for p in engine.module.parameters())
    lines = [
        f"{config.name}: {parameters:,} parameters, {config.method}, "
        f"kernels {served(engine.module.backend)}" + (", blocks compiled" if t.compile == "blocks" else ""),
        f"{t.tokens_per_step:,} tokens per step = {counted(ranks, 'rank')} x {engine.accumulation} accumulation "
        f"x {counted(config.micro_batch, 'sequence')} x {config.model.context} tokens",
        f"ZeRO {config.distributed.zero_stage}, {t.precision}" + (f", resumed after step {start}" if start else ""),
    ]
    if config.train.init_from and not start:
        lines.append(f"weights from {config.train.init_from}")
    if engine.module.backend == "triton" or t.compile == "blocks":
        lines.append(f"kernels ready after {warm_up:.0f} s")
    return "\n".join(lines)


class StopSignal:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C has reached any rank; a second Ctrl-C interrupts at once.

    The old handlers return on exit.
    """

    number: int | None = None

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.number = number

    @property
    def received(self) -> bool:
        return self.number is not None

    def check(self, engine: Engine) -> None:
        """Raise `Stopped` on all ranks where a signal has reached any by now. A collective call."""
        if engine.world_size > 1:
            anywhere = bool(engine.all_reduce_sum(torch.tensor(float(self.received))) > 0)
        else:
            anywhere = self.received
        if anywhere:
            self.number = self.number or signal.SIGTERM
            raise Stopped(self.number)

    def anywhere(self, engine: Engine) -> bool:
        """Whether to stop after the step just done, the same on all ranks. Needs `engine.stop_if(...)`.

        Of several ranks: what had reached any of them when the step's gradient was complete.
        """
        stopping = self.received if engine.world_size == 1 else engine.stopping
        if stopping:
            self.number = self.number or signal.SIGTERM  # of another rank
        return stopping
