"""The log of a run: `metrics.jsonl` always, the terminal, and wandb where the config sets it.

`metrics.jsonl` holds one JSON object per line. `kind: step` lines carry step (1-based: steps done), tokens (trained so
far), seconds (of training so far, evaluation and checkpoints excluded), loss and `loss/<label>` (nats per target token,
mean since the previous line, skipped steps left out), lr and `lr/<group>` (of groups with a factor of their own),
tokens_per_second, skipped_steps (of the run so far, because loss or gradient was not finite), and of the gradient:
grad_norm (of this step, before clipping), `grad_norm/<group>` (joint: all weights that no group owns),
`grad_share/<group>` (its share of grad_norm squared, which is what clips), clipped and clip_factor (share of the steps
since the previous line that were clipped, and the mean factor of all of them), and norms: {label: {"residual": by
layer, "attention": {group: by layer}, "mlp": {...}}} (of this step's tokens, sgtm/model/output_norms.py; with experts
also "experts": {group: [least, largest share] by layer}, with `steering.direction` "projection"). `kind: eval` lines
carry step, losses: {"full": {category: nats}, "without <domain>": {...}}, norms: {"full": {category: as above}, ...},
and what the losses rest on (sgtm/evaluation/losses.py): true_labels, measured: {category: {documents, tokens}}, errors
and difference_errors, as losses; `kind: probe` lines carry step and grad_norms: {label: {group: norm}}
(sgtm/training/step.py), just before that step; `kind: warning` lines carry step and text (sgtm/run/residual.py); `kind:
checkpoint` lines carry step, bytes, paused (seconds that training stood still for it) and written (seconds until it was
in place); `kind: unlearn` and `kind: adapt` lines, of `sgtm unlearn` and `sgtm adapt` alone, are described in
sgtm/unlearning/loop.py.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sgtm.config.schema import Config
from sgtm.config.sections import WandbConfig
from sgtm.evaluation.effects import MANY, described
from sgtm.evaluation.losses import Losses, not_finite
from sgtm.files import sync_directory, write_atomically
from sgtm.masking.labels import FORGET
from sgtm.masking.labels import MANY as MANY_DOMAINS
from sgtm.model.output_norms import Norms
from sgtm.process.ranks import rank_and_size
from sgtm.run.residual import ResidualWatch
from sgtm.run.resume import resume_command
from sgtm.run.saving import Saved
from sgtm.run.wandb_id import SENT, claim
from sgtm.words import counted

WANDB_START, WANDB_FINISH = 30, 60
"""Seconds that wandb's server gets to answer the start of a run, and to take the rest at its end."""
REFUSAL = re.compile(
    r"permission denied|not logged in|unauthorized|forbidden|\b(project|entity|team)\b.* not found"
    r"|\b(status|status code|error|http)[ :]*40[134]\b",
    re.IGNORECASE,
)
"""In the answer of a server that refuses a run, and in no error of one out of reach."""


class MetricsLog:
    """Rank 0's record of a run; on other ranks every call does nothing.

    start  steps done already: lines of `metrics.jsonl` beyond it (from a run that was killed after its last checkpoint)
           are dropped, so that a resumed run has one line per step.
    """

    def __init__(self, run: Path, config: Config, *, rank: int, start: int):
        self.run, self.config, self.active, self.start = run, config, rank == 0, start
        self.seconds = 0.0

    def open(self) -> set[int]:
        """Begin to write, on rank 0; returns the steps that have been evaluated.

        Raises ValueError where wandb refuses, before `metrics.jsonl` is touched.
        """
        self.console = Console()
        self.progress = None
        self.path = self.run / "metrics.jsonl"
        before = read_metrics(self.path)
        self.wandb, self.in_wandb = _start_wandb(self.run, self.config, before, self.print)
        lines = [line for line in before if line["step"] <= self.start]
        self.seconds = max((line["seconds"] for line in lines if line["kind"] == "step"), default=0.0)
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.watch = ResidualWatch(self.config)
        for line in lines:
            self.watch.see(line)
        self.file = self.path.open("a", buffering=1)
        self.progress = _progress(self.console) if self.console.is_terminal else None
        if self.progress:
            self.task = self.progress.add_task("", total=self.config.train.steps, completed=self.start, text="")
        return {line["step"] for line in lines if line["kind"] == "eval"}

    def __enter__(self) -> MetricsLog:
        if self.active and self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        if not self.active:
            return
        if self.progress:
            self.progress.stop()
        with suppress(OSError):  # the error has been raised before
            self.file.close()
        if self.wandb:
            with self._without_wandb():
                self.wandb.finish(exit_code=int(error[0] is not None))

    def step(self, values: dict) -> None:
        """One line of training; `values` as described above."""
        if not self.active:
            return
        self.seconds = values["seconds"]
        self._write({"kind": "step", **values})
        labels = "  ".join(_by_label({k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}))
        parts = [f"loss {values['loss']:.3f}", f"({labels})" if labels else ""]
        parts += [f"{skipped} skipped" if (skipped := values.get("skipped_steps")) else ""]
        text = "  ".join(filter(None, [*parts, f"{values['tokens_per_second']:,.0f} tokens/s"]))
        if self.progress:
            self.progress.update(self.task, completed=values["step"], text=text)
        else:
            left = (self.config.train.steps - values["step"]) * self.config.train.tokens_per_step
            minutes = left / max(values["tokens_per_second"], 1e-9) / 60
            self.print(f"step {values['step']}/{self.config.train.steps}  {text}  {minutes:.1f} min left")
        if warning := self.watch.see({"kind": "step", **values}):
            self._write({"kind": "warning", "step": values["step"], "text": warning})
            self.print(f"warning: {warning}")

    def evaluation(self, step: int, losses: Losses, norms: dict[str, Norms], sample: dict[str, Any]) -> None:
        """One line of an evaluation; arguments as of `sgtm.evaluation.losses.Evaluation`."""
        if not self.active:
            return
        self._write({"kind": "eval", "step": step, "losses": losses, "norms": norms, **sample})
        limit = self.config.train.eval_limit
        sequences = "on all sequences" if limit is None else f"on up to {counted(limit, 'sequence')} each"
        many = len(losses) > MANY + 1
        for name, by_category in [*losses.items()][: 1 if many else None]:
            values = ", ".join(f"{c} {v:.3f}" for c, v in by_category.items())
            self.print(f"eval at step {step}, {sequences}: {name}: {values}")
        if many:
            tokens = {category: count["tokens"] for category, count in sample["measured"].items()}
            for sentence in described(losses, sample["true_labels"], tokens):
                self.print(f"  {sentence}")
        if bad := not_finite(losses):
            self.print(f"warning: step {step}: not finite: the loss of {bad}; the model has diverged")

    def checkpoint(self, saved: Saved | None) -> None:
        """A checkpoint that is in place, if there is one."""
        if self.active and saved:
            times = {"paused": round(saved.paused, 4), "written": round(saved.seconds, 4)}
            self._write({"kind": "checkpoint", "step": saved.step, "bytes": saved.bytes, **times})
            self.print(f"checkpoint saved: {saved.path}")
            if saved.problem:
                self.print(f"warning: checkpoint saved, but {saved.problem}")

    def sync(self) -> None:
        """Flush `metrics.jsonl` to the disk, so that no checkpoint outlives the lines before it. Raises OSError."""
        if self.active:
            self.file.flush()
            os.fsync(self.file.fileno())
            sync_directory(self.run)

    def probe(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        if self.active:
            self._write({"kind": "probe", "step": step, "grad_norms": norms})

    def print(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        if self.active:
            (self.progress.console if self.progress else self.console).print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def _without_wandb(self) -> Iterator[None]:
        """Where wandb's own process has died, the run continues without it."""
        try:
            yield
        except Exception as error:
            self.print(f"warning: wandb has stopped ({error}); {self.path} has everything")
            self.wandb = None
            import wandb

            with suppress(Exception):
                wandb.teardown()  # or it prints a traceback at the end

    def _write(self, line: dict) -> None:
        try:
            self.file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as error:
            command = resume_command(self.run, int(rank_and_size()[1]))
            raise OSError(
                f"{self.path} could not be written: {error.strerror}; the checkpoints are unchanged. Fix the disk, "
                f"then resume: {command}"
            ) from error
        if self.wandb and line["kind"] in SENT and line["step"] > self.in_wandb.get(line["kind"], 0):
            flat = {f"eval/{k}/{c}": v for k, by in line.get("losses", {}).items() for c, v in by.items()}
            flat |= {f"probe/{k}/{g}": v for k, by in line.get("grad_norms", {}).items() for g, v in by.items()}
            if line["kind"] == "step":
                norms = line.get("norms", {}).items()
                flat |= {f"residual/{label}": parts["residual"][-1] for label, parts in norms}
                flat |= {f"projection/{label}": parts["projection"] for label, parts in norms if "projection" in parts}
            numbers = {k: v for k, v in {**line, **flat}.items() if isinstance(v, int | float)}
            with self._without_wandb():
                self.wandb.log(numbers, step=line["step"])


def _by_label(losses: dict[str, float]) -> list[str]:
    """`es 3.210` for each label; of many domains the mean and the range."""
    forget = {label: loss for label, loss in losses.items() if label.startswith(FORGET)}
    if len(forget) <= MANY_DOMAINS:
        return [f"{label} {loss:.3f}" for label, loss in losses.items()]
    mean, low, high = fmean(forget.values()), min(forget.values()), max(forget.values())
    others = [f"{label} {loss:.3f}" for label, loss in losses.items() if label not in forget]
    return [*others, f"{len(forget)} domains {mean:.3f} ({low:.3f} to {high:.3f})"]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )


def read_metrics(path: Path) -> list[dict]:
    """Lines of `metrics.jsonl`, none without a file; the last one, where a kill has cut it short, is left out.

    Raises ValueError naming the line for any other that is none of a log, or not UTF-8.
    """
    texts = path.read_bytes().splitlines() if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text.decode())
            whole = isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line
            problem = "" if whole else "not a line of a log"
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except ValueError:
            problem = "not a JSON object"
        if not problem:
            lines.append(line)
        elif number < len(texts):
            shown = repr(text[:80]).removeprefix("b")
            remedy = "delete the line, or put back a copy of the file"
            raise ValueError(f"{path}, line {number}: {problem}: {shown}; {remedy}")
    return lines


def _finite(value):
    """The same without infinities and NaNs, which JSON does not have: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(run: Path, config: Config, lines: list[dict], write: Callable[[str], None]):
    """The wandb run, or None, and the last step by kind that it has. `offline` writes below the run directory, to be
    synced later with `wandb sync`.

    Its id is kept in the run directory (sgtm/run/wandb_id.py), so that a resumed run writes to the same wandb run. A
    server that does not answer never holds up training: the run is then an offline one, and what is not taken at the
    end stays on the disk. Raises ValueError without a login, for names that wandb or its server refuses.

    lines  of the log so far
    """
    w = config.wandb
    if w.mode == "off":
        if w != WandbConfig():
            write("warning: keys of wandb are set, but wandb.mode is off: nothing is logged there")
        return None, {}
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    run_id, logged = claim(run, lines, write)

    def start(mode: Literal["online", "offline"]):
        return wandb.init(
            project=w.project,
            entity=w.entity,
            name=config.name,
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(run),
            config=config.model_dump(mode="json"),
            allow_val_change=True,  # what a resumed run may change
            settings=wandb.Settings(init_timeout=WANDB_START, finish_timeout=WANDB_FINISH),
        )

    try:
        return start(w.mode), logged
    except ValidationError as error:  # of wandb's settings, which the environment sets too
        problem = error.errors()[0]
        name = f"WANDB_{str(problem['loc'][0]).upper()}" if problem["loc"] else "wandb's settings (WANDB_*)"
        raise ValueError(f"{name}: found {problem['input']!r}: {problem['msg']}") from None
    except wandb.Error as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].rstrip(". ")
        login = isinstance(error, wandb.errors.AuthenticationError)
        if isinstance(error, wandb.errors.CommError) and not login:
            if REFUSAL.search(reason):
                raise ValueError(
                    f"wandb's server refuses the run ({reason}); correct wandb.project {w.project!r} or wandb.entity "
                    f"{w.entity!r}, log in with `wandb login`, or set wandb.mode offline"
                ) from None
            write(
                f"warning: wandb's server does not answer ({reason}); logging offline: wandb sync {run}/wandb/offline-*"
            )
            wandb.teardown()  # its service holds the id of the failed run
            return start("offline"), logged
        if login or "API key" in reason:
            how = "" if "wandb login" in reason else "; log in with `wandb login`"
            raise ValueError(f"wandb.mode {w.mode}: {reason}{how}, or set wandb.mode offline") from None
        raise ValueError(f"wandb refuses the run (project {w.project!r}, entity {w.entity!r}): {reason}") from None
