"""What a run has written, read back: at any age of the run, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import build, record
from pages import CONFIG, SUMMARY, page_without_figures, step, write_run

from sgtm.report import write_report
from sgtm.report.findings import loss_rows
from sgtm.report.record import read_record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_half_a_last_line_is_forgiven_and_a_repeated_step_counts_once(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(step(80, loss=1.5) + "\n" + '{"kind": "st')
    steps = read_record(run).steps
    assert [line["step"] for line in steps] == list(range(1, 91))
    assert steps[79]["loss"] == 1.5


def test_damage_is_named(run, tmp_path):
    (run / "metrics.jsonl").write_text(step(1) + "\n{oops}\n" + step(2) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        write_report(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text('{"losses":')
    with pytest.raises(ValueError, match=r"summary\.json is not valid JSON"):
        write_report(run)
    with pytest.raises(ValueError, match="not a run directory"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("steps", [None, 60], ids=["no summary", "outdated"])
def test_what_training_has_evaluated_is_shown(run, steps):
    """Where nothing has been measured later; true labels of a line without them are those of the corpus."""
    sample = {"measured": {"en": {"documents": 3, "tokens": 740}}, "errors": {"full": {"en": 0.5}}}
    last = {
        "kind": "eval",
        "step": 90,
        "losses": {"full": {"en": 3.0, "es": None}, "without es": {"en": 2.5, "es": 5.0}},
    }
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**last, **sample, "true_labels": {"en": "retain", "es": "forget:es"}}) + "\n")
    (run / "summary.json").unlink()
    if steps:
        (run / "summary.json").write_text(json.dumps({**SUMMARY, "steps": steps}))
    page = page_without_figures(run)
    assert page.rows[1][:3] == ["en", "retain", "740"] and page.rows[1][3:5] == ["3.000 ± 0.500", "2.500"]
    assert page.rows[2][3] == "nan" and "makes the loss infinite or undefined on es" in page.text
    sentence = "These losses are of the evaluation in training after step 90, on up to 64 sequences of each category; "
    assert sentence in page.text and ("summary.json is of step 60." in page.text) == (steps is not None)
    (run / "config.yaml").write_text(CONFIG.replace("steps: 90", "steps: 90, eval_sequences: all"))
    assert "in training after step 90; sgtm eval" in (text := page_without_figures(run).text)
    assert "measures the gradient norms." in text
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "steps": 90}))
    assert "in training after step" not in page_without_figures(run).text


def test_an_older_evaluation_in_training_has_its_true_labels_from_the_corpus(run, tmp_path):
    (run / "summary.json").unlink()
    corpus = build(tmp_path / "corpus", [record(n, category) for n in range(3) for category in ("en", "es", "web")])
    assert {row.true_label for row in loss_rows(read_record(run).summary)} == {""}, "no corpus there"
    (run / "config.yaml").write_text(CONFIG + f"data: {{path: {corpus.path}}}\n")
    true_labels = {row.category: row.true_label for row in loss_rows(read_record(run).summary)}
    assert true_labels == {"en": "retain", "es": "forget:es"}
