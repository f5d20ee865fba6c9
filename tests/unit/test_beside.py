"""Other runs beside a run: their losses are of the same evaluation, and a note names what each is."""

from __future__ import annotations

import json

import pytest
from evaluated_runs import evaluations, write_run

from sgtm.config import load_config
from sgtm.config.load import save_config
from sgtm.report.beside import compare

NONE, FILTERED = "--masking.strategy=none", "--data.upsample={es: 0}"


def test_unmasked_and_filtered_runs_beside_a_run(tmp_path):
    """A curve for each kind of training; runs of one kind make one by their lengths."""
    run = write_run(tmp_path, "run", evaluations(40))
    unmasked = write_run(tmp_path, "unmasked", evaluations(10, 20, 40, 100), NONE)
    lengths = [
        write_run(tmp_path, f"f{n}", evaluations(1, n), NONE, FILTERED, f"--train.steps={n}") for n in (20, 40, 80)
    ]
    comparison = compare(run, [unmasked, *lengths])
    assert comparison.losses == {
        "unmasked": {"en": 2.0, "es": 3.0}, "f20": {"en": 6.0, "es": 7.0}, "f40": {"en": 3.5, "es": 4.5},
        "f80": {"en": 2.25, "es": 3.25},
    }  # fmt: skip
    assert list(comparison.ratios) == ["unmasked", "f20, f40, f80"] and comparison.notes[0].startswith(
        "unmasked: trained without m"
    )
    assert comparison.ratios["unmasked"]["full"]["en"].value == pytest.approx(0.4)
    assert comparison.ratios["f20, f40, f80"]["full"]["en"].value == pytest.approx(0.5)
    assert comparison.notes[1] == f"f20: trained without masks, es left out, {20 * 512:,} tokens."


def test_runs_with_a_token_filter_make_a_curve_of_their_own(tmp_path):
    none = (NONE, "--data.mixing=token")
    run = write_run(tmp_path, "run", evaluations(40), "--data.mixing=token")
    unmasked = write_run(tmp_path, "unmasked", evaluations(10, 20, 40, 100), *none)
    options = (*none, "--masking.span_policy=position", "--data.token_filter=loss")
    filtered = write_run(tmp_path, "filtered", evaluations(10, 20, 40, 100), *options)
    comparison = compare(run, [unmasked, filtered])
    assert list(comparison.ratios) == ["unmasked", "filtered"]
    assert comparison.notes[1] == f"filtered: trained without masks, token filter loss, {100 * 512:,} tokens."


def test_a_run_without_a_curve_stands_beside_another_all_the_same(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    comparison = compare(run, [write_run(tmp_path, "short", evaluations(50), NONE)])
    assert comparison.losses == {"short": {"en": 3.0, "es": 4.0}} and not comparison.ratios
    about, no_ratio = comparison.notes
    assert about == f"short: trained without masks, {50 * 512:,} tokens, at step 50 of 100."
    few = "a learning curve needs 3 evaluations or more, the baseline has 1"
    assert no_ratio == f"No compute ratio to short: en: {few}; train it with --train.eval_every 33."


def test_losses_beside_a_run_are_of_the_same_evaluation(tmp_path):
    """`sgtm eval` has measured other sequences than the evaluation in training."""
    run, other = (write_run(tmp_path, name, evaluations(40, 100)) for name in ("run", "other"))
    summary = {"losses": {"full": {"en": 1.5}}, "steps": 100, "of_steps": 100, "split": "test", "sequences": None}
    summary |= {"errors": {"full": {"en": 0.25}}}
    cases = [
        ([], 2.0, ""),
        ([other], 2.0, ""),
        ([run], 2.0, f"other sequences than the run; for the same ones: sgtm eval {other}"),
        ([run, other], 1.5, ""),
    ]
    for evaluated, loss, note in cases:
        for folder in (run, other):
            (folder / "summary.json").unlink(missing_ok=True)
        for folder in evaluated:
            (folder / "summary.json").write_text(json.dumps(summary))
        comparison = compare(run, [other])
        assert (comparison.losses["other"]["en"], comparison.errors["other"] == {"en": 0.25}) == (loss, loss == 1.5)
        assert (note in comparison.notes[0]) and ("other sequences" in comparison.notes[0]) == bool(note)
    (other / "summary.json").write_text(json.dumps({**summary, "sequences": 8}))
    assert "other sequences than the run (--split, --sequences)" in compare(run, [other]).notes[0]
    measured = {"en": {"documents": 3, "tokens": 99}}  # of a small test split, all of it either way
    (other / "summary.json").unlink()
    (run / "summary.json").write_text(json.dumps({**summary, "measured": measured}))
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line | {"measured": measured}) + "\n" for line in lines))
    comparison = compare(run, [other])
    assert comparison.losses["other"]["en"] == 2.0 and "other sequences" not in comparison.notes[0]


def test_two_runs_of_one_name_are_distinguished_by_their_folder(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    others = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        others.append(write_run(tmp_path / folder, "same", evaluations(40), f"--data.path={tmp_path}"))
    save_config(
        load_config("debug", ["--name=run", "--train.steps=100", f"--data.path={tmp_path}"]), run / "config.yaml"
    )
    assert list(compare(run, others).losses) == list(map(str, others))


def test_what_has_no_losses_to_show_beside_a_run_is_refused(tmp_path):
    run = write_run(tmp_path, "run", evaluations(40))
    wider = write_run(tmp_path, "wider", evaluations(10, 20, 40), "--model.intermediate_size=96")
    blind, same = write_run(tmp_path, "blind", {}), write_run(tmp_path, "same", evaluations(10, 20, 40))
    for other, problem in ((wider, "model.intermediate_size is 64 and 96"), (blind, "was not evaluated: ")):
        with pytest.raises(ValueError, match=problem):
            compare(run, [other])
    for others, problem in (([run], "is the run itself"), ([same, same], "is given twice")):
        with pytest.raises(ValueError, match=f"--baseline {others[-1]} {problem}"):
            compare(run, others)
