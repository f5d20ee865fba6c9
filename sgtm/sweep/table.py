"""The result of a sweep: a row for each variant, mean and spread over the seeds of four losses, or of six.

Losses are those of the evaluation after a run's last step (`train.eval_sequences` of each category of split test), in
nats per token. `retain` is the mean over the categories that no domain owns, unlabeled ones too, `forget` over those of
the domains, each category counting the same; `full` is the model as trained, `ablated` the one without any domain.
Nothing is ablated from a model that was trained without masks. Where the sweep has `adjacent` categories, their mean is
a loss of its own, and they do not count as retained.

`table.jsonl` is all that the page of a sweep is made of (page.py). It has more than the table: for each variant
`settings` (dotted keys of the config), `parameters` (of the full model) and `trained` (tokens by true and applied
label, sgtm/data/trained.py); for each seed `evaluations` (tokens so far and the four losses) and `residual` (norm of
the residual stream after the last layer, by applied label, at the last step that has it).
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from sgtm.config.reference import flat
from sgtm.data.store import Corpus
from sgtm.data.trained import trained_tokens
from sgtm.estimate.shapes import parameter_sizes
from sgtm.files import write_atomically
from sgtm.masking.labels import removal_name
from sgtm.run.metrics import read_metrics
from sgtm.sweep.file import Run, Sweep
from sgtm.sweep.state import final_losses

CAPTION = "retain: mean over the categories that no domain owns, unlabeled ones too"
NOT_ADJACENT = ", adjacent ones not"
MODELS, DATA = ("full", "ablated"), ("retain", "adjacent", "forget")
SIX = tuple(f"{model}_{data}" for model in MODELS for data in DATA)
LOSSES = tuple(name for name in SIX if not name.endswith("_adjacent"))


@dataclass(frozen=True)
class Row:
    """
    runs        of the variant, finished or not
    losses      those of each finished run, by its name: four or six; NaN for one that was not finite or not measured
    categories  of each finished run: losses by condition and category, as the run has them
    trained     tokens by true and applied label; empty without a finished run
    evaluations of each finished run: tokens so far and the four losses
    residual    of each finished run: norm of the residual stream after the last layer, by applied label
    names       of the losses
    """

    variant: str
    runs: tuple[Run, ...]
    losses: dict[str, dict[str, float]]
    categories: dict[str, dict[str, dict[str, float | None]]]
    trained: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluations: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    residual: dict[str, dict[str, float]] = field(default_factory=dict)
    names: tuple[str, ...] = LOSSES

    @property
    def tokens(self) -> int:
        train = self.runs[0].config.train
        return train.steps * train.tokens_per_step

    @property
    def masks(self) -> bool:
        """Whether the variant has ablated losses."""
        return any(self.runs[0].config.removals)

    def mean(self, loss: str) -> float | None:
        """None without a finished run."""
        values = self._values(loss)
        return statistics.fmean(values) if values else None

    def spread(self, loss: str) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        values = self._values(loss)
        return None if len(values) < 2 else math.nan if any(map(math.isnan, values)) else statistics.stdev(values)

    def _values(self, loss: str) -> list[float]:
        return [by_loss[loss] for by_loss in self.losses.values()]


def read_rows(sweep: Sweep, corpora: dict[str, Corpus | None]) -> list[Row]:
    """A row for each variant, in the order of the file."""
    rows = []
    for variant in sweep.variants:
        runs = tuple(run for run in sweep.runs if run.variant == variant)
        row = Row(variant, runs, {}, {}, names=SIX if sweep.adjacent else LOSSES)
        for run in runs:
            losses, corpus = final_losses(run.directory, run.config), corpora[run.name]
            if losses and corpus:
                row.losses[run.name] = losses_of(losses, corpus.categories, run, sweep.adjacent)
                row.categories[run.name] = losses
                if not row.trained:
                    row.trained.update(trained_tokens(corpus, run.config))
                _read_log(row, run, corpus.categories, sweep.adjacent)
        rows.append(row)
    return rows


def _read_log(row: Row, run: Run, true_labels: dict[str, str], adjacent: Sequence[str]) -> None:
    """Adds the evaluations and the residual norms of a run."""
    size = run.config.train.tokens_per_step
    residual: dict[str, float] = {}
    evaluations = row.evaluations[run.name] = []
    for line in read_metrics(run.directory / "metrics.jsonl"):
        if line["kind"] == "eval":
            means = losses_of(line["losses"], true_labels, run, adjacent)
            evaluations.append({"tokens": line["step"] * size, **means})
        elif line["kind"] == "step":
            norms = {label: norm["residual"][-1] for label, norm in line.get("norms", {}).items()}
            residual |= {label: norm for label, norm in norms.items() if norm is not None}
    row.residual[run.name] = residual


def losses_of(losses: dict, true_labels: dict[str, str], run: Run, adjacent: Sequence[str] = ()) -> dict[str, float]:
    """The four losses of one run, with adjacent categories six; NaN where nothing is ablated, no category was measured
    or one is not finite."""
    data_of = {name: "forget" if label.startswith("forget:") else "retain" for name, label in true_labels.items()}
    data_of |= dict.fromkeys(adjacent, "adjacent")
    means = {}
    for name in SIX if adjacent else LOSSES:
        model, data = name.split("_")
        removed = run.config.space.domains if model == "ablated" else ()
        by_category = losses[removal_name(removed)] if removed in run.config.removals else {}
        mine = [loss for category, loss in by_category.items() if data_of[category] == data]
        known = mine and all(loss is not None for loss in mine)
        means[name] = statistics.fmean(mine) if known else math.nan
    return means


def write_table(sweep: Sweep, rows: list[Row]) -> None:
    """`table.csv` and `table.jsonl` in the sweep's folder; floats are written in full."""
    write_atomically(sweep.folder / "table.jsonl", "".join(json.dumps(_record(row)) + "\n" for row in rows))
    text = io.StringIO()
    names = rows[0].names
    spreads = [name for loss in names for name in (loss, f"{loss}_sd")]
    table = csv.DictWriter(text, ["variant", "finished", "runs", "tokens", *spreads], lineterminator="\n")
    table.writeheader()
    for row in rows:
        record = _record(row)
        flat = {key: record[key] for key in ("variant", "finished", "runs", "tokens")}
        table.writerow(flat | {name: record[name] for name in spreads})
    write_atomically(sweep.folder / "table.csv", text.getvalue())


def print_table(rows: list[Row], console: Console) -> None:
    """Losses as `mean ± spread`; a variant of which runs are missing shows how many there are."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="held-out loss, nats per token", title_justify="left")
    table.add_column("variant", overflow="fold")
    table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    for loss in rows[0].names:
        table.add_column(loss.replace("_", "\n"), justify="right")
    for row in rows:
        of = len(row.runs) if len(row.losses) == len(row.runs) else f"{len(row.losses)} of {len(row.runs)}"
        table.add_row(row.variant, str(of), f"{row.tokens:,}", *(_cell(row, loss) for loss in row.names))
    console.print(table)
    console.print(CAPTION + NOT_ADJACENT * (rows[0].names == SIX), highlight=False, soft_wrap=True)


def _cell(row: Row, loss: str) -> str:
    mean, spread = row.mean(loss), row.spread(loss)
    if mean is None or (loss.startswith("ablated") and not row.masks):
        return "-"
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def _record(row: Row) -> dict:
    statistic = {
        name: _json(value)
        for loss in row.names
        for name, value in ((loss, row.mean(loss)), (f"{loss}_sd", row.spread(loss)))
    }
    each = [
        {
            "run": run.name,
            "seed": run.seed,
            **_finite(row.losses[run.name]),
            "losses": row.categories[run.name],
            "evaluations": [_finite(line) for line in row.evaluations.get(run.name, ())],
            "residual": row.residual.get(run.name, {}),
        }
        for run in row.runs
        if run.name in row.losses
    ]
    counts = {"finished": len(row.losses), "runs": len(row.runs), "tokens": row.tokens}
    parameters = sum(parameter_sizes(row.runs[0].config).values())
    about = {"masks": row.masks, "parameters": parameters, "trained": row.trained, "settings": _settings(row)}
    return {"variant": row.variant, **counts, **statistic, **about, "seeds": each}


def _settings(row: Row) -> dict:
    """Of the first seed, without what names the run."""
    values = flat(row.runs[0].config.spelled_out())
    return {key: value for key, value in values.items() if key not in ("name", "runs")}


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {key: _json(value) for key, value in values.items()}


def _json(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
