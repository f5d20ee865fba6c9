"""sgtm/audit/behaviour.py: how far logits and losses may be apart. Whole folders: tests/unit/test_audit.py."""

import shutil

import pytest
from audited import change_tensors, evaluated_run

from sgtm.audit import behaviour
from sgtm.audit.record import read_export_record
from sgtm.config.load import load_run_config
from sgtm.hf.export import export_run
from sgtm.run.checkpoint import find_latest, read_manifest
from sgtm.run.evaluate import open_run_corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = evaluated_run(tmp_path_factory.mktemp("behaviour"), "gpt_neo")
    folder = export_run(run, ["es"], run.parent / "safe")
    config, checkpoint = load_run_config(run), find_latest(run)
    return (
        folder,
        read_export_record(folder),
        config,
        checkpoint,
        open_run_corpus(config, run, read_manifest(checkpoint)),
    )


def test_of_other_groups_the_logits_are_others(made):
    folder, record, config, checkpoint, _ = made
    assert behaviour.logit_problems(folder, record, config, checkpoint, ["es"]) == []
    for groups in ([], ["fr"], ["es", "fr"]):
        (problem,) = behaviour.logit_problems(folder, record, config, checkpoint, groups)
        assert "its logits differ from the ablated model's by " in problem


@pytest.mark.parametrize(("factor", "count"), [(1 + 1e-6, 0), (1 + 1e-4, 1)])
def test_logits_may_differ_by_rounding_alone(made, tmp_path, factor, count):
    folder, record, config, checkpoint, _ = made
    shutil.copytree(folder, tmp_path / "safe")
    change_tensors(tmp_path / "safe", lambda tensors: tensors["transformer.ln_f.weight"].mul_(factor))
    assert len(behaviour.logit_problems(tmp_path / "safe", record, config, checkpoint, ["es"])) == count


@pytest.mark.parametrize("key", ["this", "full", "this_error", "full_error"])
def test_losses_are_the_cards_within_rounding(made, key):
    def problems(rows: list[dict], **changes) -> list[str]:
        changed = {**record, **changes, "losses": {**record["losses"], "rows": rows}}
        return behaviour.loss_problems(folder, changed, config, checkpoint, corpus)

    folder, record, config, checkpoint, corpus = made
    first, *others = record["losses"]["rows"]
    assert problems([first, *others]) == []
    for change, count in ((0.9e-3, 0), (2e-3, 1), (-2e-3, 1)):
        assert len(problems([{**first, key: first[key] + change}, *others])) == count
    assert len(problems([{**first, key: None}, *others], reduced={"es": 0.5})) == (key != "this")
    (problem,) = problems([first, *others, {**first, "category": "none"}])
    assert problem.endswith("sgtm_export.json: losses: a row of none, of which the split has no token")
