"""Sections and figures of the experiments (experiments.py) in the documents.

The figures in docs/figures are those of `sgtm report FILE` for the committed file of rows; each carries a SHA-256 of
that file and of the code that draws, so that `report.py --check` finds one that is out of date.
"""

from __future__ import annotations

import statistics
from hashlib import sha256
from pathlib import Path

from experiments import EXPERIMENTS, FOLDERS, PARTS, ROOT
from matplotlib import rc_context
from PIL import Image
from tables import markdown

from sgtm.evaluation import compute_ratio, leakage
from sgtm.files import sha256_of
from sgtm.report import figures as report_figures
from sgtm.report import legend, palette
from sgtm.report.figures import STYLE
from sgtm.sweep import figures as sweep_figures
from sgtm.sweep import study, study_figures
from sgtm.sweep.page import EXHIBITS
from sgtm.sweep.study import read_study, retained_tokens

FIGURES = ROOT / "docs" / "figures"
DATA = ("retain", "adjacent", "forget")
RATIOS = (("full", "retain"), ("full", "forget"), ("ablated", "retain"))
DRAWING = (study, study_figures, sweep_figures, report_figures, legend, palette, leakage, compute_ratio)
"""The code that a figure depends on."""
CAPTIONS = {figure.__name__: caption for figure, caption, _ in EXHIBITS}


def tables(rows: list[dict]) -> str:
    """Markdown: losses of each variant, mean and spread over the seeds, and compute ratios where they were computed; a
    table for each sweep."""
    ratios, adjacent = any(row["ratios"] for row in rows), any("full_adjacent" in row for row in rows)
    data = "on retained, adjacent and forgotten data" if adjacent else "on retained and on forgotten data"
    plain = not all(row.get("masks", True) for row in rows)
    about = (
        "Held-out loss in nats per token, mean and sample standard deviation over the seeds: of the full model and of "
        f"the ablated one (without what holds the domain: a group, a direction or adapters), {data}. "
        + "Nothing is ablated from a model that was trained without masks. " * plain
        + "Tokens: of the training, and of them those of retained text. " * any(row.get("trained") for row in rows)
        + "The seeds change the initial weights alone, unless the result names more. Another CPU rounds bf16 "
        "differently, so that a single seed moves: below the table stand those that the rows are of."
    )
    if ratios:
        about += (
            " Compute: at what share of the baseline's training the baseline reaches this loss (`unmasked` for the "
            "full model, `filtered` for the ablated one), by the curve through its rows of several lengths (`-450`: "
            "steps). The tokens of the run itself are not taken into account: compare them in their column. * outside "
            "that curve."
        )
    parts = [about]
    for kind in dict.fromkeys(row.get("sweep") for row in rows):
        parts += [PARTS[kind]] if kind in PARTS else []
        parts.append(markdown(_variants([row for row in rows if row.get("sweep") == kind], ratios)))
    return "\n\n".join(parts)


def sets(rows: list[dict]) -> str:
    """Markdown: for each variant of a sweep of several domains, the full model's loss of every category, and its change
    without every set of them; empty where no row has several."""
    parts, several = [], any(len(seed.get("losses", ())) > 2 for row in rows for seed in row["seeds"])
    for row in rows if several else ():
        losses = [seed["losses"] for seed in row["seeds"] if "losses" in seed]
        if losses:
            table = [[row["variant"], *losses[0]["full"]]]
            for condition in losses[0]:
                cells = []
                for category in table[0][1:]:
                    full, own = ([seed[each][category] for seed in losses] for each in ("full", condition))
                    values = own if condition == "full" else [b - a for a, b in zip(full, own, strict=True)]
                    sign = "" if condition == "full" else "+"
                    cells.append(f"{statistics.fmean(values):{sign}.3f}" + _deviation(values))
                table.append([condition, *cells])
            parts.append(markdown(table))
    title = (
        "Loss of the full model by category, and its change without every set of domains, paired by seed: mean and "
        "sample standard deviation over the seeds"
    )
    return "\n\n".join([title, *parts]) if parts else ""


def _deviation(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def settings(rows: list[dict]) -> str:
    """Markdown: the settings of a grid, one of which was chosen for each method; empty without any."""
    tried = [row for row in rows if "chosen" in row]
    if not tried:
        return ""
    table = [["method", "options", "rate, of the default", "retain", "forget", "chosen"]]
    for row in tried:
        options = ", ".join(f"{name} {value:g}" for name, value in row["options"].items())
        losses = (f"{row[data]:.3f}" for data in ("retain", "forget"))
        table.append([row["method"], options, f"{row['factor']:g}", *losses, "yes" if row["chosen"] else ""])
    before = ""
    if "retain_before" in tried[0]:
        before = f"; before: {tried[0]['retain_before']:.3f} and {tried[0]['forget_before']:.3f}"
    return f"Settings tried on one seed, losses of the full model on split train{before}\n\n{markdown(table)}"


def described(name: str, rows: list[dict], path: str, figures: str) -> str:
    """The tables, below what the experiment asks and above what it shows.

    rows     of variants and of settings
    path     of the file of rows, from the root of the repository
    figures  of their folder, from the document
    """
    experiment, variants = EXPERIMENTS[name], [row for row in rows if "variant" in row]
    images = [
        f"![{figure} of {name}]({figures}/{name}-{figure}.png)\n\n{CAPTIONS[figure]}" for figure in experiment.figures
    ]
    folders = " ".join(f"--{FOLDERS[word]} {word}" for word in ("NOVELS", "ARXIV") if word in experiment.commands)
    whole = f"python benchmarks/experiments.py {name} {folders}".rstrip()
    parts = [
        f"**Question.** {experiment.question}",
        f"**Command.** `{whole}` runs these; `sgtm report {path}` draws the figures.",
        f"```sh\n{experiment.commands}\n```",
        tables(variants),
        settings(rows),
        sets(variants),
        *images,
        f"**Result.** {experiment.meaning}",
    ]
    return "\n\n".join(filter(None, parts))


def _variants(rows: list[dict], ratios: bool) -> list[list[str]]:
    losses = [(model, data) for model in ("full", "ablated") for data in DATA if f"full_{data}" in rows[0]]
    seen = any(row.get("trained") for row in rows)
    table = [["recipe", "seeds", "tokens", *["retained"] * seen, *(f"{model}, {data}" for model, data in losses)]]
    table[0] += [f"compute, {model} {data}" for model, data in RATIOS] if ratios else []
    for row in rows:
        cells = [row["variant"], str(row["finished"]), f"{row['tokens']:,}"]
        cells += [f"{retained:,.0f}" if (retained := retained_tokens(row.get("trained", {}))) else ""] * seen
        masks = row.get("masks", True)
        cells += [_loss(row, f"{model}_{data}") * (model == "full" or masks) for model, data in losses]
        for model, data in RATIOS if ratios else ():
            ratio = row["ratios"].get(f"{model}_{data}") if model == "full" or masks else None
            cells.append(f"{ratio['value']:.2f}{'*' * ratio['extrapolated']}" if ratio else "")
        table.append(cells)
    return table


def _loss(row: dict, loss: str) -> str:
    spread = row[f"{loss}_sd"]
    if row[loss] is None:  # nothing is ablated from a model without masks
        return ""
    return f"{row[loss]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def figure_files(results: list[Path]) -> dict[Path, tuple[Path, str]]:
    """For each figure of the documents the file of rows and the figure's name."""
    return {
        FIGURES / f"{path.stem}-{figure}.png": (path, figure)
        for path in results
        if path.stem in EXPERIMENTS
        for figure in EXPERIMENTS[path.stem].figures
    }


def is_current(image: Path, results: Path) -> bool:
    """Whether the figure was drawn from this very file, by this very code."""
    if not image.exists():
        return False
    with Image.open(image) as picture:
        return picture.info.get("Source") == source_of(results)


def source_of(results: Path) -> str:
    """SHA-256 of the file of rows and of the code that draws it."""
    code = (Path(module.__file__ or "") for module in DRAWING)
    return sha256("".join(map(sha256_of, (results, *code))).encode()).hexdigest()


def draw(image: Path, results: Path, figure: str) -> None:
    """Write the figure. Raises LookupError where the rows do not have what it shows."""
    with rc_context(STYLE):
        drawn = getattr(study_figures, figure)(read_study(results))
        if drawn is None:
            raise LookupError(f"{results} has no figure {figure}")
        image.parent.mkdir(exist_ok=True)
        drawn.savefig(image, dpi=120, metadata={"Source": source_of(results), "Software": None})
