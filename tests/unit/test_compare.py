"""What makes the losses of a sweep's runs comparable; tests/processes/test_sweep_run.py has what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import LABELS, build, record
from sweeps import sweep_of

from sgtm.config import ConfigError
from sgtm.sweep import compare
from sgtm.sweep.compare import _held_out, check_adjacent, check_comparable, check_measured, check_ranks, open_corpora


def test_runs_of_one_corpus_share_it_and_a_synthetic_one_may_be_missing(tmp_path: Path, monkeypatch):
    build(tmp_path / "corpus", [record(n, category) for n in range(3) for category in LABELS], LABELS)
    opened, original = [], compare.open_corpus

    def recorded(config, *rest, **options):
        opened.append(config.name)
        return original(config, *rest, **options)

    monkeypatch.setattr(compare, "open_corpus", recorded)
    monkeypatch.setattr(compare, "check_corpus", lambda corpus, config: None)
    data = tmp_path / "corpus"
    text = f"variants: {{a: {{data.path: {data}}}, b: {{data.path: {data}/../corpus}}, c: , d: }}"
    corpora = open_corpora(sweep_of(tmp_path, text))
    assert corpora["a-s0"] is corpora["b-s0"] and corpora["a-s0"].path == data
    assert corpora["c-s0"] is corpora["d-s0"] is None
    assert opened == ["a-s0", "c-s0"]


def test_a_run_whose_losses_would_be_missing_is_named(tmp_path: Path):
    documents = [record(n, category) for n in range(9) for category in LABELS]
    corpus = build(tmp_path / "corpus", [*documents, record(10, "en", 300, "test")], LABELS)
    sweep = sweep_of(tmp_path, "variants: {a: , b: }")
    check_measured(sweep, {"a-s0": None, "b-s0": None})
    with pytest.raises(ConfigError, match=r"mine\.yaml: run b-s0: split test of .*corpus has no text of es, whose"):
        check_measured(sweep, {"a-s0": None, "b-s0": corpus})
    held_out = [record(n, category, split="test") for n in range(300) for category in LABELS]
    corpus = build(tmp_path / "other", [record(0), *held_out])
    with pytest.raises(ConfigError, match=r"mine\.yaml: run b-s0: the masks of es have nothing to train on"):
        check_measured(sweep, {"a-s0": None, "b-s0": corpus})


def test_a_direction_that_is_missing_is_refused_with_its_run(tmp_path: Path):
    text = f"variants: {{a: , b: {{steering.direction: {tmp_path / 'none.safetensors'}}}}}"
    with pytest.raises(ConfigError, match=r"mine\.yaml: run b-s0: steering\.direction: .*none\.safetensors"):
        open_corpora(sweep_of(tmp_path, text))


def test_held_out_documents_are_the_same_in_any_order_and_beside_any_training(tmp_path: Path):
    held_out = [record(n, category, split="test") for n in range(3) for category in ("en", "es")]
    first = build(tmp_path / "first", [record(100), *held_out])
    second = build(tmp_path / "second", [*held_out[::-1], record(100), record(101)])
    assert first.fingerprint != second.fingerprint and _held_out(first) == _held_out(second)
    renamed = [{**fields, "category": "web"} if fields["category"] == "es" else fields for fields in held_out]
    third = build(tmp_path / "third", [record(100), *renamed])
    assert _held_out(third) != _held_out(first)


def test_variants_that_may_differ_bind_no_other(tmp_path: Path):
    """`b` may have other tokens than all; `a` and `c` are compared with one another."""
    text = "variants: {b: {train.steps: 6}, a: , c: {train.steps: %d}}\nmay_differ: {b: [tokens]}"
    alike = sweep_of(tmp_path, text % 4)
    check_comparable(alike, dict.fromkeys(run.name for run in alike.runs))
    unlike = sweep_of(tmp_path, text % 5)
    with pytest.raises(ConfigError) as error:
        check_comparable(unlike, dict.fromkeys(run.name for run in unlike.runs))
    assert str(error.value) == (
        f"{unlike.file}: a-s0 and c-s0 differ in train.steps x train.tokens_per_step: 4 x 512 = 2,048 and 5 x 512 = "
        "2,560; give both the same, or allow it on purpose with may_differ: {c: [tokens]}"
    )


def test_the_run_that_does_not_divide_among_the_ranks_is_named(tmp_path: Path):
    sweep = sweep_of(tmp_path, "variants: {a: {train.micro_batch: 1}, b: {train.micro_batch: 4}}")
    check_ranks(sweep, 2)
    with pytest.raises(ConfigError, match=r"mine\.yaml: run b-s0: train\.tokens_per_step 512"):
        check_ranks(sweep, 4)


@pytest.mark.parametrize("category", ["fr", "es"])
def test_an_adjacent_category_is_one_that_is_retained(tmp_path: Path, category):
    corpus = build(tmp_path / "corpus", [record(n, name) for n in range(3) for name in LABELS], LABELS)
    sweep = sweep_of(tmp_path, f"variants: {{a: }}\nadjacent: [web, {category}]")
    with pytest.raises(
        ConfigError, match=rf"mine\.yaml: adjacent: '{category}' is no category of .* those are en, web"
    ):
        check_adjacent(sweep, {"a-s0": corpus})
    check_adjacent(sweep_of(tmp_path, "variants: {a: }\nadjacent: [web]"), {"a-s0": corpus, "b": None})
