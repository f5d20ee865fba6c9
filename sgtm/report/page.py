"""The page of a run: one HTML file that needs nothing else, and its figures as PNGs beside it.

Promises, each in `tests/unit/test_page.py`: the page asks the network for nothing; its table holds exactly the
figures of `summary.json`; and whatever a run does not have yet is named instead of shown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from sgtm.config.schema import Config
from sgtm.files import write_atomically
from sgtm.masking.channel import row_lines
from sgtm.masking.labels import OPEN, lowered_domains
from sgtm.report import figures, palette
from sgtm.report.beside import RunComparison
from sgtm.report.coloured import coloured
from sgtm.report.figures import Drawing, draw
from sgtm.report.findings import (
    SMALL,
    cautions,
    conditions,
    error_of,
    localisation,
    loss_rows,
    sentences,
    set_rows,
    signed,
)
from sgtm.report.ratios import categories_of
from sgtm.report.record import RunRecord, is_forgotten, read_record
from sgtm.run.environment import last_environment
from sgtm_kernels.tables import JOINT_KINDS, PROJECTIONS, Tables

SHIPPED = "The baselines ship with the preset: full models trained without masks, means over seeds."


@dataclass(frozen=True)
class Exhibit:
    """A figure of the page: its caption, and what is missing where it could not be drawn."""

    name: str
    caption: str
    missing: str
    drawing: Drawing | None


@dataclass(frozen=True)
class Grid:
    """A strategy table: a number for each label (row) and column."""

    title: str
    meaning: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


EXHIBITS = (
    (
        figures.ablation,
        "Held-out loss in nats per token. Ring: the full model. Dot: the same weights with the domain's heads and "
        "neurons inactive, or without its adapters. The number is the difference and its standard error over "
        f"documents; bold where it is meant to rise, faint where {SMALL}.",
        "No ablation has been measured: sgtm eval writes it to summary.json, unless the training masks nothing.",
    ),
    (
        figures.loss_curves,
        "Training loss in nats per token, by the label the tokens were trained as, against the optimizer step.",
        "No training losses yet: metrics.jsonl holds no steps.",
    ),
    (
        figures.evaluations,
        "Held-out loss in nats per token while training: the full model (solid) and without a domain (dashed).",
        "Fewer than two evaluations during training: set train.eval_every to see them.",
    ),
    (
        figures.residual_norms,
        "Norm of the residual stream (L2, mean over a label's tokens) after the first, a middle and the last layer. "
        "Where it grows several times over, the groups out-shout one another and learning stalls.",
        "No norms of the residual stream: metrics.jsonl holds none.",
    ),
    (
        figures.gradient_norms,
        "Rows: true label of the data; framed: its own group. Columns: group of heads and neurons, with a domain's own "
        "embedding and head where it has them. Values: norm of the gradient on the group's weights over the norm of "
        "these weights (no unit), after training and with nothing masked, so that every group runs and learns from all "
        "data; an embedding of its own enlarges the second norm. Shades span four decades. This shows where further "
        "training without masks would change the weights most. It does not show what a group has learned: whether a "
        "domain is localised, the losses with and without its group show.",
        "Gradient norms are not measured in training: sgtm eval writes them to summary.json.",
    ),
    (
        figures.partition,
        "Who owns what. Rows: layers. Columns: query heads, and below MLP neurons, at their original indices. Colours: "
        "the group that owns them.",
        "The partition is unknown: config.yaml is missing.",
    ),
    (
        figures.speed,
        "Throughput in tokens per second over all ranks, and the global gradient norm before clipping.",
        "No throughput yet: metrics.jsonl holds no steps.",
    ),
)


MAP_CAPTION = (
    "Change of the held-out loss, against the full model. Rows: sets of removed domains. Columns: retained data and "
    "the data of each domain. Red: the loss rises; blue: it falls; framed where it is meant to rise."
)
"""Of the first exhibit, where there are many sets."""


def write_report(run: Path, comparison: RunComparison | None = None) -> Path:
    """Write `report/index.html` and its PNGs into the run directory and return the page's path.

    comparison  other runs to show beside it, in place of the baselines that ship with its preset

    Works on a run at any age: what is missing is said on the page. Raises ValueError if `run` is not a directory or
    one of its files is damaged.
    """
    record = read_record(run)
    captions = {figures.ablation: MAP_CAPTION} if set_rows(record.summary) else {}
    exhibits = [
        Exhibit(paint.__name__, captions.get(paint, caption), missing, draw(paint.__name__, record, paint))
        for paint, caption, missing in EXHIBITS
    ]
    return write_page(run / "report", exhibits, render(record, exhibits, comparison))


def write_page(folder: Path, exhibits: list[Exhibit], html: str) -> Path:
    """Write `index.html` and the PNGs of its figures into a folder, which is made, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for exhibit in exhibits:
        picture = folder / f"{exhibit.name}.png"
        picture.unlink(missing_ok=True)  # an older report's figure must not outlive its data
        if exhibit.drawing:
            picture.write_bytes(exhibit.drawing.png)
    page = folder / "index.html"
    write_atomically(page, html)
    return page


def render(record: RunRecord, exhibits: list[Exhibit], comparison: RunComparison | None = None) -> str:
    """The page as HTML."""
    texts, summary = sentences(record), record.summary
    notes = comparison.notes if comparison else [SHIPPED] if summary.get("baselines") else []
    return template("page.html.j2").render(
        record=record,
        headline=texts[0],
        others=[*texts[1:], *cautions(summary), *(f"Warning: {text}." for text in record.warnings)],
        facts=_facts(record),
        rows=loss_rows(summary),
        conditions=[] if (sets := set_rows(summary)) else conditions(summary),
        sets=sets,
        sizes="measured" in summary,
        baselines=comparison.losses if comparison else summary.get("baselines") or {},
        baseline_errors=comparison.errors if comparison else {},
        notes=notes,
        ratios=comparison.ratios if comparison else {},
        categories_of=categories_of,
        localisation=localisation(summary),
        passages=coloured(summary),
        small=SMALL,
        provenance=_provenance(record),
        signed=signed,
        error_of=error_of,
        is_forgotten=is_forgotten,
        removed_domains=lowered_domains,
        exhibits=exhibits,
        grids=strategy_grids(record.config.tables) if record.config else [],
        channels=channel_grids(record.config) if record.config else [],
    )


def template(name: str, package: str = "sgtm.report") -> Template:
    """A template of a package, which can include those of this one; what a page needs of colours is set."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("sgtm.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "svg": lambda drawing: Markup(drawing.svg)}
    environment.globals |= {"light": palette.css(palette.LIGHT), "dark": palette.css(palette.DARK)}
    return environment.get_template(name)


def strategy_grids(tables: Tables) -> list[Grid]:
    """The strategy's tables; projections whose `update` is alike share one."""
    projections_of: dict[tuple, list[str]] = {}
    for projection in PROJECTIONS:
        projections_of.setdefault(tables.update[projection], []).append(projection)
    grids = [
        ("active", "the group's output, forward", tables.groups, tables.active),
        ("route", "the gradient through that output", tables.groups, tables.route),
    ]
    for table, projections in projections_of.items():
        which = "" if len(projections) == len(PROJECTIONS) else f" ({', '.join(projections)})"
        grids.append((f"update{which}", "the token's share in the group's weight gradient", tables.groups, table))
    joint = tuple(zip(*(tables.update_joint[kind] for kind in JOINT_KINDS), strict=True))
    grids.append(("update_joint", "the same, for parameters that belong to no group", JOINT_KINDS, joint))
    return [
        Grid(title, meaning, columns, tuple(zip(tables.labels, table, strict=True)))
        for title, meaning, columns, table in grids
    ]


def channel_grids(config: Config) -> list[tuple[Grid, list[str]]]:
    """Each label channel of the run, and what its rows buy and cost."""
    labels, grids = config.space.labels, []
    for start, channel in config.channels:
        since = f"from step {start} on" if len(config.channels) > 1 else "in the whole run"
        rows = zip(labels, map(tuple, channel.matrix.tolist()), strict=True)
        grid = Grid("channel", since, labels, tuple(row for row in rows if not row[0].startswith(OPEN)))
        grids.append((grid, row_lines(channel, config.tables, config.masking.strategy)))
    return grids


def _provenance(record: RunRecord) -> dict[str, str]:
    """Where the newest start of the training ran, and the versions there; else those of the evaluation."""
    trained = last_environment(record.run) or {}
    values = {key: trained.get(key) for key in ("device", "threads", "commit", "python", "driver", "time")}
    values |= trained.get("versions") or record.summary.get("versions") or {}
    return {name: value for name, value in values.items() if value is not None}


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """(what, value) of the run as a whole; only what is known."""
    last = record.steps[-1] if record.steps else {}
    known = {**{key: last.get(key) for key in ("tokens", "tokens_per_second", "seconds")}, "steps": last.get("step")}
    known |= {key: value for key, value in record.summary.items() if value is not None}
    facts = []
    if record.config:
        masking = record.config.masking
        facts += [("strategy", masking.strategy), ("domains", ", ".join(masking.domains))]
        token_filter = record.config.data.token_filter
        facts += [("token filter", token_filter)] if token_filter != "off" else []
        facts += [("recipe", record.config.recipe)] if record.config.recipe and masking.strategy != "none" else []
    written = {
        "parameters": lambda n: f"{n / 1e6:,.2f} M" if n < 1e9 else f"{n / 1e9:,.2f} B",
        "steps": lambda n: f"{n:,}",
        "tokens": lambda n: f"{n / 1e6:,.2f} M" if n < 1e9 else f"{n / 1e9:,.2f} B",
        "tokens_per_second": lambda n: f"{n:,.0f}",
        "seconds": lambda s: f"{s:.0f} s" if s < 120 else f"{s / 60:.1f} min" if s < 7200 else f"{s / 3600:.1f} h",
    }
    names = {"tokens_per_second": "tokens per second", "seconds": "training time"}
    facts += [(names.get(key, key), form(known[key])) for key, form in written.items() if known.get(key) is not None]
    return facts


def _code(sentence: str) -> Markup:
    """Escaped text whose `words` in backticks are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))
