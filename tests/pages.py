"""Run directories as a training and an evaluation leave them, and the report's page read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

from sgtm.report.beside import RunComparison
from sgtm.report.page import render
from sgtm.report.record import read_record

CONFIG = """\
name: trial
model: {layers: 3, hidden_size: 32, heads: 4, intermediate_size: 64, vocab_size: 512, context: 64}
masking: {domains: [es, fr], forget_heads: {es: [0], fr: 1}, forget_neurons: 8, masked_layers: [1, 2]}
train: {steps: 90, tokens_per_step: 512}
optimizer: {warmup_steps: 2}
"""
SUMMARY = {
    "name": "trial",
    "losses": {
        "full": {"es": 3.3456789, "en": 3.1234567, "fr": 2.5},
        "without es": {"es": 6.5551, "en": 3.1412, "fr": 2.4},
        "without es,fr": {"es": 6.6, "en": 3.2, "fr": 5.25},
    },
    "true_labels": {"en": "retain", "es": "forget:es", "fr": "forget:fr"},
    "seconds": 361.2,
    "tokens_per_second": 9012.3,
    "steps": 90,
    "tokens": 46080,
    "parameters": 1313792,
    "gradient_norms": {"retain": {"retain": 0.02, "es": 0.0}, "forget:es": {"retain": 1e-4, "es": 0.03}},
    "baselines": {"no filter": {"en": 3.0125}},
    "versions": {"torch": "9.8.7+test"},
}


def step(n: int, **more) -> str:
    line = {"kind": "step", "step": n, "tokens": n * 512, "loss": 4.0, "loss/retain": 3.0 + 1 / n, "lr": 1e-3}
    residual = {"retain": [0.3, 2.0, 3.0, 4.0]} | ({"forget:fr": [0.3, 2.0, None, 9.0 * n]} if n % 3 == 0 else {})
    line["norms"] = {label: {"residual": by_layer} for label, by_layer in residual.items()}
    return json.dumps(line | {"grad_norm": 1.0, "tokens_per_second": 9e3, "seconds": n / 10} | more)


def evaluation(n: int) -> str:
    losses = {"full": {"en": 3.0, "es": 3.1}, "without es": {"en": 3.0, "es": 5.0}}
    return json.dumps({"kind": "eval", "step": n, "losses": losses})


def write_run(folder: Path) -> Path:
    (folder / "config.yaml").write_text(CONFIG)
    lines = [step(n) for n in range(1, 91)] + [evaluation(n) for n in (30, 60, 90)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


class Page(HTMLParser):
    """Tags opened and not closed, figures, tables as rows of cell texts, and the exact values of `<data>`."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, file: Path):
        super().__init__()
        self.text, self.source = "", file.read_text(encoding="utf-8")
        self.open, self.ids, self.rows, self.values, self.sources = [], [], [], [], []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.sources += [attrs[key] for key in ("src", "href", "xlink:href") if key in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data":
            self.values.append(float(attrs["value"]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = " ".join((self.rows[-1][-1] + data).split())


def page_without_figures(run: Path, comparison: RunComparison | None = None) -> Page:
    """In a fraction of the time."""
    file = run / "page.html"
    file.write_text(render(read_record(run), [], comparison), encoding="utf-8")
    return Page(file)


def many_categories(**more) -> dict:
    """Three retain categories of 1,000, 9,000 and 740 tokens, two unlabeled ones, and Spanish."""
    changes = {"es": 1.0, "a": 0.30, "b": -0.10, "tiny": 9.0, "u": 0.5, "v": 0.7}
    tokens = {"es": 5000, "a": 1000, "b": 9000, "tiny": 740, "u": 2000, "v": 2000}
    true = {"es": "forget:es", "u": "unlabeled", "v": "unlabeled"} | dict.fromkeys(("a", "b", "tiny"), "retain")
    losses = {"full": dict.fromkeys(changes, 2.0), "without es": {c: 2.0 + by for c, by in changes.items()}}
    measured = {category: {"documents": 9, "tokens": n} for category, n in tokens.items()}
    return {"losses": losses, "true_labels": true, "measured": measured, **more}
