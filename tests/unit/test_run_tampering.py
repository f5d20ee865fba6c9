"""`tamper.jsonl`: a row for every attack and evaluated step, continued after an interruption, never repeated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from corpora import build, mixed_records
from tampered import tampered

from sgtm.evaluation.losses import evaluate
from sgtm.evaluation.tampering import difference, worst_case
from sgtm.run import tampering
from sgtm.run.tamper_plan import make_plan
from sgtm.run.tampering import FILE, attack_run, full_loss, read_grids

GRID = {"budgets": [1, 3], "multiples": [0.5, 2], "data": ["forget"], "tokens": 32, "sequences": 3}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "corpus", mixed_records())


@pytest.fixture
def target(corpus, tmp_path, monkeypatch):
    return tampered(monkeypatch, tmp_path / "run", corpus)


@pytest.fixture
def attacks(monkeypatch):
    """Those that are run."""
    run, attack = [], tampering.tamper

    def noting(subject, which):
        run.append(which)
        return attack(subject, which)

    monkeypatch.setattr(tampering, "tamper", noting)
    return run


def rows_of(target) -> list[dict]:
    return [json.loads(line) for line in (target.run / FILE).read_text().splitlines()]


def test_rows_are_those_of_the_grid(target, attacks):
    plan = make_plan(target, **GRID)
    reached = attack_run(target, plan)
    rows = rows_of(target)
    steps = [(a.schedule, a.lr, step) for a in plan.attacks for step in a.evaluated]
    assert [(row["attack"]["schedule"], row["attack"]["lr"], row["step"]) for row in rows] == steps
    assert [(r.attack.schedule, r.attack.lr, r.step) for r in reached] == steps
    assert [r.loss for r in reached] == [row["forget"] for row in rows]
    assert len({row["forget"] for row in rows if row["step"] == 0}) == 1
    for row in rows:
        assert row["tokens"] == 32 * row["step"] and row["condition"] == "without es" and row["domains"] == ["es"]
        assert row["losses"] == {"es": row["forget"], "en": row["retain"]}
        assert row["errors"] == {"es": row["forget_error"], "en": row["retain_error"]}
        assert sum(row["documents"]["losses"]) / sum(row["documents"]["targets"]) == row["forget"]
    assert [r.documents and r.documents._asdict() for r in reached] == [
        {name: tuple(values) for name, values in row["documents"].items()} for row in rows
    ]
    assert attacks == list(plan.attacks)


def test_an_interruption_changes_nothing(target, attacks, monkeypatch):
    plan = make_plan(target, **GRID)
    whole = attack_run(target, plan)
    content = (target.run / FILE).read_bytes()
    (target.run / FILE).unlink()
    attack = tampering.tamper

    def interrupted(subject, which):
        for number, point in enumerate(attack(subject, which)):
            if which == plan.attacks[2] and number == 1:
                raise KeyboardInterrupt
            yield point

    with monkeypatch.context() as patch:
        patch.setattr(tampering, "tamper", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attack_run(target, plan)
    assert content.startswith((target.run / FILE).read_bytes()) and len(rows_of(target)) == 2 * 4
    del attacks[:]
    assert attack_run(target, plan) == whole
    assert attacks == list(plan.attacks[2:]) and (target.run / FILE).read_bytes() == content


def test_what_is_there_is_not_repeated_unless_again(target, attacks):
    plan = make_plan(target, **GRID)
    lines: list[str] = []
    first = attack_run(target, plan, note=lines.append)
    content = (target.run / FILE).read_bytes()
    assert len(lines) == len(plan.attacks) and lines[0].startswith(f"attack 1 of 6 on {target.run}: forget, constant")
    del attacks[:], lines[:]
    assert attack_run(target, plan, note=lines.append) == first
    assert attacks == lines == []
    assert attack_run(target, plan, again=True) == first
    assert attacks == list(plan.attacks) and (target.run / FILE).read_bytes() == content


@pytest.mark.parametrize("change", ["weights", "sequences", "seed", "rows", "removed"])
def test_rows_of_something_else_are_kept_and_not_taken(target, attacks, change, corpus, tmp_path, monkeypatch):
    grid = GRID | {"multiples": [1], "schedules": ["constant"]}
    attack_run(target, make_plan(target, **grid))
    before = (target.run / FILE).read_text().splitlines()
    del attacks[:]
    if change == "weights":
        target = replace(target, weights="of another checkpoint")
    elif change == "rows":
        (target.run / FILE).write_text("\n".join(before[:2]) + "\n")
    elif change == "removed":
        target = tampered(monkeypatch, target.run, corpus, masking={"strategy": "none"})
    else:
        grid[change] = 2
    attack_run(target, make_plan(target, **grid))
    after = (target.run / FILE).read_text().splitlines()
    assert len(attacks) == 1
    assert after == before if change == "rows" else (after[:4] == before and len(after) == 8)


def test_rows_without_documents_stay_and_are_not_paired(target, attacks):
    """As those written by `sgtm tamper` before rows had them."""
    plan = make_plan(target, **GRID | {"multiples": [1], "schedules": ["constant"]})
    first = attack_run(target, plan)
    rows = [{name: value for name, value in row.items() if name != "documents"} for row in rows_of(target)]
    (target.run / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    del attacks[:]
    older = attack_run(target, plan)
    assert attacks == [] and older == [reached._replace(documents=None) for reached in first]
    assert difference(older[-1], first[0]).paired is False
    assert attack_run(target, plan, again=True) == first


def test_a_model_that_has_not_seen_the_domain_is_its_own_control(corpus, tmp_path, monkeypatch):
    """Two safe models that are the same, with groups that differ: the difference of the curves is exactly 0."""
    curves = []
    for name, group in (("a", None), ("b", 7)):
        target = tampered(monkeypatch, tmp_path / name, corpus, group, name)
        curves.append(worst_case(attack_run(target, make_plan(target, **GRID))))
    assert curves[0] == curves[1] and len({r.loss for r in curves[0].values()}) == 4
    assert {difference(curves[0][step], curves[1][step]) for step in curves[0]} == {(0.0, 0.0, True)}
    full = []
    for name, group in (("a", None), ("b", 7)):
        target = tampered(monkeypatch, tmp_path / name, corpus, group, name)
        full.append(full_loss(target, make_plan(target, **GRID)))
    assert full[0] != full[1]


def test_what_was_reached_is_read_back(target):
    reached = attack_run(target, make_plan(target, **GRID))
    assert read_grids(target.run) == {"without es": (GRID["sequences"], reached)}
    newer = replace(target, weights="newer")
    more = attack_run(newer, make_plan(newer, **GRID | {"multiples": [1]}))
    assert read_grids(target.run)["without es"].reached == more  # of the newest weights alone
    (target.run / FILE).unlink()
    assert read_grids(target.run) == {}


@pytest.mark.parametrize("other", [{"sequences": 1}, {"tokens": 64}])
def test_a_small_trial_does_not_hide_the_grid(target, other):
    """It is measured on other text, or its steps are of other sizes: its attacks are no part of the grid either."""
    reached = attack_run(target, make_plan(target, **GRID))
    attack_run(target, make_plan(target, **GRID | {"multiples": [1], **other}))
    assert read_grids(target.run) == {"without es": (GRID["sequences"], reached)}


def test_many_attacks_of_a_step_do_not_hide_a_long_one(target):
    long = attack_run(target, make_plan(target, **GRID | {"multiples": [1], "schedules": ["constant"], "budgets": [8]}))
    short = {"multiples": [1, 2], "schedules": ["constant"], "budgets": [1], "sequences": 1}
    attack_run(target, make_plan(target, **GRID | short))
    assert read_grids(target.run)["without es"].reached == long


def test_the_loss_of_a_baseline_is_that_of_its_full_model(target):
    plan = make_plan(target, **GRID)
    subject = target.subject(())
    whole = evaluate(
        subject.model, subject.corpus, subject.config, split="test", sequences=3, device=subject.device
    ).losses
    assert full_loss(target, plan) == pytest.approx(whole["full"]["es"], rel=1e-6)
    assert attack_run(target, plan)[0].loss == pytest.approx(whole["without es"]["es"], rel=1e-6)


def test_an_attack_that_diverges_has_rows_without_losses(target):
    lines: list[str] = []
    plan = make_plan(target, **GRID | {"multiples": [1e39], "schedules": ["constant"]})
    reached = attack_run(target, plan, note=lines.append)
    rows = rows_of(target)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[-1]["forget"] is rows[-1]["retain"] is None
    assert rows[-1]["losses"] == {} and rows[-1]["documents"] is None and lines[0].endswith("; diverged")
    assert {r.loss for r in worst_case(reached).values()} == {rows[0]["forget"]}
    assert attack_run(target, plan)[0] == reached[0]


@pytest.mark.parametrize("line", ["{", '{"step": 1}', "[1, 2]", "7"])
def test_a_damaged_file_is_an_error_and_stays(target, line, attacks):
    plan = make_plan(target, **GRID | {"multiples": [1], "schedules": ["constant"]})
    attack_run(target, plan)
    content = (target.run / FILE).read_text() + line + "\n"
    (target.run / FILE).write_text(content)
    del attacks[:]
    with pytest.raises(ValueError, match=r"tamper\.jsonl, line 5: not a row of an attack"):
        attack_run(target, plan)
    assert not attacks and (target.run / FILE).read_text() == content


@pytest.mark.parametrize("documents", [{"losses": [1.0], "targets": [2, 3]}, {"losses": [1.0]}, 7, {}, [[1.0], [2]]])
def test_damaged_documents_are_an_error(target, documents, attacks):
    plan = make_plan(target, **GRID | {"multiples": [1], "schedules": ["constant"]})
    attack_run(target, plan)
    rows = [{**row, "documents": documents} for row in rows_of(target)]
    (target.run / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"tamper\.jsonl, line 1: not a row of an attack"):
        attack_run(target, plan)
