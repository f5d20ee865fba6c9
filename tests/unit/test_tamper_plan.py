"""The grid of attacks on a run, and what is refused before anything is trained."""

from __future__ import annotations

import math

import pytest
from corpora import build, mixed_records, record
from tampered import tampered

from sgtm.run.tamper_plan import make_plan


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build(tmp_path_factory.mktemp("data") / "corpus", mixed_records())


@pytest.fixture
def target(corpus, tmp_path, monkeypatch):
    return tampered(monkeypatch, tmp_path / "run", corpus)


def test_the_grid_is_every_mixture_schedule_and_rate(target):
    plan = make_plan(target, multiples=[0.5, 2], budgets=[10, 3], adjacent=["web"], data=["forget", "adjacent"])
    rows = [(a.data, a.schedule, a.lr, a.steps, a.warmup) for a in plan.attacks]
    assert rows == [
        row
        for data in ("forget", "adjacent")
        for row in (
            (data, "constant", 0.005, 10, 0),
            (data, "constant", 0.02, 10, 0),
            (data, "cosine", 0.005, 3, 0),
            (data, "cosine", 0.005, 10, 1),
            (data, "cosine", 0.02, 3, 0),
            (data, "cosine", 0.02, 10, 1),
        )
    ]
    assert [a.parts for a in plan.attacks[::6]] == [(("es",),), (("web",),)]
    assert {a.evaluated for a in plan.attacks if a.steps == 10} == {(0, 1, 2, 3, 4, 8, 10)}
    assert (plan.domains, plan.forget, plan.retain) == (("es",), ("es",), ("en",))


def test_defaults(target):
    plan = make_plan(target)
    assert len(plan.attacks) == 2 * (4 + 4 * 3)
    assert {a.parts for a in plan.attacks} == {(("es",),), (("es",), ("en",))}
    assert sorted({a.lr for a in plan.attacks}) == pytest.approx([1e-3, 2.5e-3, 1e-2, 3e-2])
    assert {(a.schedule, a.steps, a.warmup) for a in plan.attacks} == {
        ("constant", 256, 1), ("cosine", 16, 1), ("cosine", 64, 6), ("cosine", 256, 25),
    }  # fmt: skip
    assert {(a.tokens, a.weight_decay, a.seed) for a in plan.attacks} == {(8 * 16, 0.0, 0)}


def test_the_warm_up_of_constant_runs_is_that_of_the_smallest_budget(target):
    plan = make_plan(target, warmup=0.5, budgets=[8, 2], multiples=[1], data=["forget"])
    assert [(a.schedule, a.steps, a.warmup) for a in plan.attacks] == [
        ("constant", 8, 1),
        ("cosine", 2, 1),
        ("cosine", 8, 4),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": ["esp"]}, r"run has no domain 'esp' \(did you mean es\?\); it has es"),
        ({"adjacent": ["wb"], "data": ["adjacent"]}, r"no category 'wb' \(did you mean web\?\); .*en, es and web"),
        ({"data": ["adjacent"]}, "give both"),
        ({"adjacent": ["web"]}, "give both"),
        ({"data": ["retain"]}, r"unknown data of an attack: retain; known: forget, forget\+retain and adjacent"),
        ({"multiples": [1, 0]}, "above 0, got 0.0"),
        ({"multiples": [-1]}, "above 0"),
        ({"multiples": [math.nan]}, "above 0"),
        ({"multiples": []}, r"--lr \[\]: give one or more multiples"),
        ({"budgets": []}, r"--steps \[\]: give one or more numbers"),
        ({"budgets": [4, 0]}, r"--steps \[4, 0\]: give one or more numbers above 0"),
        ({"warmup": 1.0}, r"--warmup 1\.0: give a share from 0 to below 1"),
        ({"warmup": -0.1}, "a share from 0 to below 1"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"sequences": 0}, "sequences 0"),
        ({"schedules": ["linear"]}, "unknown schedule 'linear'"),
        ({"tokens": 40}, r"--tokens 40: a step of .* takes a multiple"),
        ({"tokens": 16}, r"a step of forget\+retain takes .* and at least 32"),
        ({"weight_decay": -0.1}, "weight_decay"),
        (
            {"adjacent": ["es"], "data": ["adjacent"]},
            "--adjacent es: that is a category of the domain itself, which is --data forget",
        ),
    ],
)
def test_what_makes_no_grid_is_refused(target, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(target, **options)


def test_one_of_several_domains_has_to_be_chosen(tmp_path, monkeypatch):
    labels = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}
    records = [record(i, c, split=s) for i in range(4) for c in labels for s in ("train", "test")]
    target = tampered(monkeypatch, tmp_path / "run", build(tmp_path / "corpus", records, labels), domains=["es", "fr"])
    with pytest.raises(ValueError, match="has the domains es and fr; choose which to win back: --domain NAME"):
        make_plan(target)
    plan = make_plan(target, domains=["fr"])
    assert (plan.forget, target.removed(plan.domains)) == (("fr",), ("fr",))
    assert make_plan(target, domains=["fr", "es"]).forget == ("es", "fr")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("es", "test"), "split test of .* has nothing of es to measure es by"),
        (("es", "train"), "split train of .* lacks text to attack with on forget; choose other --data"),
        (("en", "train"), r"split train of .* lacks text to attack with on forget\+retain;"),
    ],
)
def test_a_split_without_the_text_of_an_attack_is_refused(tmp_path, monkeypatch, missing, message):
    records = [fields for fields in mixed_records() if (fields["category"], fields["split"]) != missing]
    target = tampered(monkeypatch, tmp_path / "run", build(tmp_path / "corpus", records))
    with pytest.raises(ValueError, match=message):
        make_plan(target)
