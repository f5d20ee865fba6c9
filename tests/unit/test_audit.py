"""An audit passes what `sgtm export` writes, and finds what was changed afterwards: which file, which entry."""

from __future__ import annotations

import shutil

import pytest
import torch
from audited import TEXTS, change_json, evaluated_run, relist
from exports import make_run
from tamperings import TAMPERINGS, WEIGHTS, full_model, removed_column_put_back

from sgtm.audit.audit import CHECKS, COSTLY, audit_export
from sgtm.hf.card import RECORD
from sgtm.hf.export import export_run
from sgtm.run.checkpoint import find_latest

EXPERTS = ("mixtral", "shared experts")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family: a run, and below `made` its exports."""
    torch.set_num_threads(1)
    runs = {family: evaluated_run(tmp_path_factory.mktemp(family), family) for family in TEXTS}
    for family, run in runs.items():
        made = run.parent / "made"
        export_run(run, ["es"], made / "safe")
        export_run(run, [], made / "full")
        # Experts cannot be zeroed.
        export_run(run, ["es"], made / "zeroed", prune=family in EXPERTS)
        export_run(run, ["es", "fr"], made / "both", dtype="bf16")
        export_run(run, ["es"], made / "shards", shard=9_000)
        export_run(run, ["fr"], made / "half", strengths={"es": 0.5})
    return {family: run.parent for family, run in runs.items()}


@pytest.mark.parametrize("name", ["safe", "full", "zeroed", "both", "shards", "half"])
@pytest.mark.parametrize("family", TEXTS)
def test_what_an_export_writes_passes_every_check(folders, family, name):
    audit = audit_export(folders[family] / "made" / name, folders[family] / "run")
    assert [check.name for check in audit.checks] == list(CHECKS)
    assert audit.passed, [check.problems for check in audit.checks]
    skipped = {check.name for check in audit.checks if check.skipped}
    assert skipped == ({"removed"} if name == "full" else set())


def test_a_folder_may_have_another_name_and_place(folders, tmp_path):
    shutil.copytree(folders["llama"] / "made" / "safe", tmp_path / "served")
    assert audit_export(tmp_path / "served", folders["llama"] / "run", skip=COSTLY).passed


def test_the_chain_is_of_every_file_of_checkpoint_and_export(folders):
    folder, run = folders["llama"] / "made" / "safe", folders["llama"] / "run"
    chain = audit_export(folder, run, skip=COSTLY).chain
    files = [*find_latest(run).iterdir(), *folder.iterdir()]
    assert sorted(path for _, path in chain) == sorted(files)


@pytest.mark.parametrize("family", TEXTS)
@pytest.mark.parametrize("tampering", TAMPERINGS, ids=lambda tampering: tampering.__name__)
def test_tampering_is_found_by_what_and_where(folders, tmp_path, tampering, family):
    check, message = TAMPERINGS[tampering]
    run = folders[family] / "run"
    shutil.copytree(folders[family] / "made" / "safe", tmp_path / "safe")
    tampering(tmp_path / "safe", run)
    audit = audit_export(tmp_path / "safe", run, skip=() if check in COSTLY else COSTLY)
    assert not audit.passed
    problems = {each.name: each.problems for each in audit.checks if each.problems}
    assert any(message in problem for problem in problems.get(check, ())), problems
    assert all(
        str(tmp_path) in line or line.startswith("sgtm_export.json")
        for each in problems.values()
        for line in each
        if str(run) not in line
    )


@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_a_removed_column_is_found_among_rounded_ones(folders, tmp_path, family):
    shutil.copytree(folders[family] / "made" / "both", tmp_path / "safe")
    removed_column_put_back(tmp_path / "safe", folders[family] / "run")
    checks = audit_export(tmp_path / "safe", folders[family] / "run", skip=COSTLY).checks
    (problem,) = next(check.problems for check in checks if check.name == "removed")
    assert " is the removed blocks.0.mlp.w_out row " in problem


def test_an_index_that_points_elsewhere_is_found(folders, tmp_path):
    shutil.copytree(folders["llama"] / "made" / "shards", tmp_path / "safe")
    change_json(tmp_path / "safe" / f"{WEIGHTS}.index.json", lambda index: index["weight_map"].update(extra="x"))
    relist(tmp_path / "safe")
    (check,) = [c for c in audit_export(tmp_path / "safe", folders["llama"] / "run", skip=COSTLY).checks if c.problems]
    assert check.name == "tensors" and check.problems == [f"{tmp_path}/safe/{WEIGHTS}.index.json: no file holds extra"]


def elsewhere(index: dict) -> None:
    files = index["weight_map"]
    files["lm_head.weight"] = next(file for file in files.values() if file != files["lm_head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (elsewhere, "lm_head.weight is in "),
        (lambda index: index["weight_map"].pop("lm_head.weight"), "lm_head.weight is in None, should be in "),
        (lambda index: index["metadata"].update(note="AAAA"), "it holds more than the files of the tensors"),
        (lambda index: index.update(note="AAAA"), "it holds more than the files of the tensors"),
    ],
    ids=["elsewhere", "nowhere", "metadata", "key"],
)
def test_an_index_of_other_tensors_or_with_room_for_text_is_found(folders, tmp_path, change, message):
    shutil.copytree(folders["llama"] / "made" / "shards", tmp_path / "safe")
    change_json(tmp_path / "safe" / f"{WEIGHTS}.index.json", change)
    relist(tmp_path / "safe")
    (check,) = [c for c in audit_export(tmp_path / "safe", folders["llama"] / "run", skip=COSTLY).checks if c.problems]
    assert check.name == "tensors" and message in check.problems[0]


def test_a_full_model_computes_otherwise_than_the_safe_one(folders, tmp_path):
    shutil.copytree(folders["gpt_neo"] / "made" / "safe", tmp_path / "safe")
    full_model(tmp_path / "safe", folders["gpt_neo"] / "run")
    problems = {c.name for c in audit_export(tmp_path / "safe", folders["gpt_neo"] / "run").checks if c.problems}
    assert {"tensors", "config", "removed", "logits", "losses"} <= problems


def test_without_the_corpus_the_rest_is_checked(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "moved")
    text = (tmp_path / "moved" / "run" / "config.yaml").read_text()
    (tmp_path / "moved" / "run" / "config.yaml").write_text(text.replace("corpus", "gone"))
    audit = audit_export(tmp_path / "moved" / "made" / "safe", tmp_path / "moved" / "run")
    assert audit.passed
    assert {c.name for c in audit.checks if c.skipped.startswith("the corpus cannot be read")} == {
        "tokenizer",
        "losses",
    }


def test_the_export_of_another_run_fails(folders, tmp_path):
    make_run(tmp_path / "run", TEXTS["llama"].replace("name: small", "name: other"))
    audit = audit_export(folders["llama"] / "made" / "safe", tmp_path / "run")
    assert [c.name for c in audit.checks if c.problems] == ["checkpoint"] and audit.chain == []


def test_what_is_no_export_is_an_error(folders, tmp_path):
    with pytest.raises(ValueError, match=r"sgtm_export\.json is missing: .* is no export"):
        audit_export(tmp_path, folders["llama"] / "run")
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(ValueError, match=r"sgtm_export\.json is not the record of an export"):
        audit_export(tmp_path, folders["llama"] / "run")
    with pytest.raises(ValueError, match="not a run directory"):
        audit_export(folders["llama"] / "made" / "safe", tmp_path)
