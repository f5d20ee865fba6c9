"""What a run says while it trains: `metrics.jsonl` always, the terminal, and wandb when asked.

`metrics.jsonl` holds one JSON object per line. `kind: step` lines carry step (1-based: steps done), tokens (trained so
far), seconds (of training so far, evaluation and checkpoints excluded), loss and `loss/<label>` (nats per target token,
mean since the previous line), lr, grad_norm (before clipping), tokens_per_second. `kind: eval` lines carry step and
losses: {"full": {category: nats}, "without <domain>": {...}}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sgtm.config.schema import Config


class MetricsLog:
    """Rank 0's record of a run; on other ranks every call does nothing.

    start  steps done already: lines of `metrics.jsonl` beyond it (from a run that was killed after its last checkpoint)
           are dropped, so that a resumed run has one line per step.
    """

    def __init__(self, run: Path, config: Config, *, rank: int, start: int):
        self.config, self.active = config, rank == 0
        self.seconds = 0.0
        if not self.active:
            return
        self.path = run / "metrics.jsonl"
        kept = _lines_until(self.path, start)
        self.seconds = max((line["seconds"] for line in kept if line["kind"] == "step"), default=0.0)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.console = Console()
        self.progress = _progress(self.console) if self.console.is_terminal else None
        self.wandb = _start_wandb(run, config)
        if self.progress:
            self.task = self.progress.add_task("", total=config.train.steps, completed=start, text="")

    def __enter__(self) -> MetricsLog:
        if self.active and self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        if not self.active:
            return
        if self.progress:
            self.progress.stop()
        self.file.close()
        if self.wandb:
            self.wandb.finish(exit_code=int(error[0] is not None))

    def step(self, values: dict) -> None:
        """One line of training; `values` as described above."""
        if not self.active:
            return
        self.seconds = values["seconds"]
        self._write({"kind": "step", **values})
        labels = "  ".join(f"{k.removeprefix('loss/')} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
        text = f"loss {values['loss']:.3f}  ({labels})  {values['tokens_per_second']:,.0f} tokens/s"
        if self.progress:
            self.progress.update(self.task, completed=values["step"], text=text)
        else:
            left = (self.config.train.steps - values["step"]) * self.config.train.tokens_per_step
            minutes = left / max(values["tokens_per_second"], 1e-9) / 60
            self.say(f"step {values['step']}/{self.config.train.steps}  {text}  {minutes:.1f} min left")

    def evaluation(self, step: int, losses: dict[str, dict[str, float]]) -> None:
        if not self.active:
            return
        self._write({"kind": "eval", "step": step, "losses": losses})
        for name, by_category in losses.items():
            self.say(f"eval at step {step}: {name}: " + ", ".join(f"{c} {v:.3f}" for c, v in by_category.items()))

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if self.active:
            (self.progress.console if self.progress else self.console).print(text, highlight=False, soft_wrap=True)

    def _write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        if self.wandb:
            flat = {f"eval/{k}/{c}": v for k, by in line.get("losses", {}).items() for c, v in by.items()}
            self.wandb.log({k: v for k, v in {**line, **flat}.items() if isinstance(v, int | float)}, step=line["step"])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _lines_until(path: Path, step: int) -> list[dict]:
    """Whole lines up to this step; a last line cut short by a kill is not one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= step:
            lines.append(line)
    return lines


def _start_wandb(run: Path, config: Config):
    """The wandb run, or None. `offline` writes below the run directory, to be synced later with `wandb sync`."""
    if config.wandb.mode == "off":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.name,
        mode=config.wandb.mode,
        dir=str(run),
        config=config.model_dump(mode="json"),
    )
