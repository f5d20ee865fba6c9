"""An examination of a run: which models each measure sees, on which text, and what is refused before any measure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.evaluation.calibration import calibrated_losses
from sgtm.evaluation.estimates import Estimate, token_mean
from sgtm.evaluation.in_context import context_gain
from sgtm.evaluation.memorisation import Recital, membership
from sgtm.evaluation.probes import probes
from sgtm.evaluation.quantisation import quantised
from sgtm.evaluation.subject import Subject
from sgtm.report.examination import examination_rows
from sgtm.run import examine as module
from sgtm.run.examine import examine_run, read_examinations, write_examination
from sgtm.run.opened import OpenedRun


@pytest.fixture
def runs(tmp_path, monkeypatch) -> dict[str, Subject]:
    """Subjects by the name of their run."""
    pairs = [(n, c) for n in range(24) for c in ("en", "es")]
    corpus = build(tmp_path / "corpus", [record(n, c, 40, "test" if n % 3 == 0 else "train") for n, c in pairs])
    config = config_for(context=32)
    unmasked = config_for(context=32, masking={"strategy": "none"})
    by_name = {
        "run": Subject(moved_model(config, 0.1), corpus, config),
        "filtered": Subject(moved_model(unmasked, 0.2), corpus, unmasked),
    }

    def opened(run: str, data: str | None) -> OpenedRun:
        return OpenedRun(Path(run), by_name[run].config, Path(run), by_name[run].corpus, run)

    monkeypatch.setattr(module, "open_with_corpus", opened)
    monkeypatch.setattr(module, "load_model", lambda config, checkpoint: by_name[checkpoint.name].model)
    return by_name


def test_every_measure_of_every_model(runs, tmp_path):
    results = examine_run("run", control="filtered", sequences=4, passages=3)
    (examined,) = results["domains"].values()
    assert list(examined["measures"]) == [*module.MEASURES, "guided"]
    assert (examined["forget"], examined["retain"]) == (("es",), ("en",))
    for name in module.MEASURES:
        assert list(examined["measures"][name]) == ["full", "without es", "control"]
    full, without = (examined["measures"]["calibrated"][name]["before"] for name in ("full", "without es"))
    assert full != without, "the group matters in a random model"
    assert write_examination(tmp_path, results) == []
    assert read_examinations(tmp_path / "examination.json") == [json.loads(json.dumps(results))]
    rows = dict(examination_rows(examined))
    names = {"calibrated loss, es", "loss unrounded, es", "loss at 4 bits, es", "extraction strength, guided 2"}
    assert set(rows) >= names
    assert set(rows["calibrated loss, es"]) == {"full", "without es", "control"}


def test_numbers_are_those_of_the_measures_themselves(runs):
    """With the split, number of sequences, bits, categories and order of models that the names say."""
    results = examine_run("run", measures=list(module.MEASURES), split="train", sequences=4, passages=3)
    measures, full = results["domains"]["es"]["measures"], runs["run"]
    models = {"full": full, "without es": full.without("es")}
    for name, subject in models.items():
        rounded = {str(bits): quantised(subject.model, bits, subject.removed) for bits in (8, 4)}
        for bits, model in ({"unrounded": subject.model} | rounded).items():
            rough = replace(subject, model=model)
            for category in ("en", "es"):
                scores = rough.scores("train", category, 4)
                loss = token_mean(scores.losses, scores.document)._asdict()
                assert measures["quantised"][name][bits][category] == loss, (name, bits, category)
        gain = context_gain(subject, "es", "en", split="train", passages=4)
        assert measures["context"][name]["es"]["gain"]["value"] == gain.gain.value, name
        assert measures["membership"][name]["es"]["value"] == membership(subject, "es", 4).value, name
        fit = calibrated_losses(subject, forget=("es",), retain=("en",), split="train", sequences=4)
        for when, losses in (("before", fit.before), ("after", fit.after)):
            expected = {category: loss._asdict() for category, loss in losses.items()}
            assert measures["calibrated"][name][when] == expected, (name, when)
        assert measures["calibrated"][name]["targets"] == fit.targets
        for layer, probe in probes(subject, "es", split="train", sequences=4).items():
            expected = {**probe._asdict(), "own_head": probe.own_head._asdict(), "fitted": probe.fitted._asdict()}
            assert measures["probes"][name]["es"][str(layer)] == expected, (name, layer)
    assert len({measures["quantised"]["full"][bits]["es"]["value"] for bits in ("unrounded", "8", "4")}) == 3


def test_examinations_of_other_settings_stay_and_measures_of_the_same_are_joined(runs, tmp_path):
    names, file = ["recital", "membership"], tmp_path / "examination.json"
    first = examine_run("run", measures=names, passages=2)
    first["domains"]["es"]["measures"]["recital"] = "to be replaced"
    write_examination(tmp_path, first)
    assert write_examination(tmp_path, examine_run("run", measures=["quantised", "recital"], passages=2)) == []
    (stored,) = read_examinations(file)
    measures = stored["domains"]["es"]["measures"]
    assert list(measures) == [*names, "quantised"]
    assert measures["recital"]["full"]["texts"] == 2 and measures["membership"]["full"]["es"]["value"] > 0
    others = ({"split": "train"}, {"sequences": 3}, {"control": "filtered"}, {"passages": 3}, {"fit_sequences": 2})
    for options in (*others, {"texts": ["ab"]}):
        other = examine_run("run", measures=["recital"], **{"passages": 2, **options})
        assert write_examination(tmp_path, other) == []
    write_examination(tmp_path, examine_run("run", measures=["probes"], passages=2))
    examinations, names_of_all = read_examinations(file), (*module.SETTINGS, *module.SAMPLES)
    default = dict.fromkeys(names_of_all) | {"split": "test", "passages": 2}
    own = {"texts": hashlib.sha256(b'["ab"]').hexdigest()}
    expected = [default | options for options in (*others, own, {})]
    assert [{name: one[name] for name in names_of_all} for one in examinations] == expected, "the newest last"
    assert list(examinations[-1]["domains"]["es"]["measures"]) == [*names, "quantised", "probes"]
    removed = write_examination(tmp_path, {**other, "weights": "others"})
    assert removed == ["recital", "membership", "quantised", "probes"] and len(read_examinations(file)) == 1
    file.write_text('{"examinations": [{}]}')
    with pytest.raises(ValueError, match=r"examination.json is damaged .*; remove it, and examine the run again"):
        write_examination(tmp_path, other)


def test_a_control_that_saw_the_domain_is_warned_of(runs):
    lines: list[str] = []
    examine_run("run", measures=["recital"], passages=3, control="filtered", log=lines.append)
    (warning,) = (line for line in lines if line.startswith("warning"))
    assert (
        warning.startswith("warning: the control filtered was trained on ") and "tokens of es: it does not" in warning
    )
    unseen = runs["filtered"].config.model_copy(deep=True)
    unseen.data.upsample["es"] = 0
    runs["unseen"] = replace(runs["filtered"], config=unseen)
    results = examine_run("run", measures=["recital"], passages=3, control="unseen", log=lines.append)
    assert results["control_warning"] == ""
    assert not [line for line in lines[2:] if line.startswith("warning")]


def test_a_control_is_taken_without_the_domain_where_that_can_be_removed(runs):
    runs["other"] = replace(runs["run"], model=moved_model(runs["run"].config, 0.3))
    own = examine_run("other", measures=["quantised"], sequences=4)["domains"]["es"]["measures"]["quantised"]
    results = examine_run("run", measures=["quantised"], sequences=4, control="other")
    assert results["domains"]["es"]["measures"]["quantised"]["control"] == own["without es"] != own["full"]
    assert "was trained on" in results["control_warning"], "though it is taken without its group"


def test_of_a_run_without_masks_the_full_model_alone_is_examined(runs):
    """Such as one that was unlearned, beside one that never saw the domain."""
    runs["unseen"] = replace(runs["filtered"], model=moved_model(runs["filtered"].config, 0.3))
    examined = examine_run("filtered", control="unseen", sequences=4, passages=3)["domains"]["es"]["measures"]
    assert list(examined) == list(module.MEASURES)
    assert all(list(by_model) == ["full", "control"] for by_model in examined.values())
    own = examine_run("run", control="filtered", measures=["quantised"], sequences=4)["domains"]["es"]["measures"]
    assert examined["quantised"]["full"] == own["quantised"]["control"] != examined["quantised"]["control"]


def test_guided_decoding_has_the_full_model_first(runs, monkeypatch):
    pairs = []
    nothing = Recital(Estimate(0.0, None), Estimate(0.0, None), 0)
    monkeypatch.setattr(module, "guided_recital", lambda *pair: pairs.append(pair) or nothing)
    examine_run("run", measures=["guided"], passages=3)
    assert [(full.removed, ablated.removed, strength) for full, ablated, _, strength in pairs] == [
        ((), ("es",), strength) for strength in (0.0, *module.STRENGTHS)
    ]


def test_guided_decoding_starts_at_the_full_model(runs):
    examined = examine_run("run", measures=["recital", "guided"], passages=3)["domains"]["es"]["measures"]
    assert examined["guided"]["0"] == examined["recital"]["full"]


def test_passages_are_the_beginnings_of_training_documents(runs, monkeypatch):
    questions = []
    monkeypatch.setitem(module.MEASURES, "recital", lambda subject, about: questions.append(about) or {})
    examine_run("run", measures=["recital"], passages=2)
    corpus = runs["run"].corpus
    first = corpus.select("train", "es")[:2]
    assert questions[0].texts == tuple(tuple(corpus.tokens(int(document), 0, 32).tolist()) for document in first)
    examine_run("run", measures=["recital"], texts=["abc", "de"])
    assert [len(text) for text in questions[-1].texts] == [3, 2]


def test_passages_are_of_all_categories_in_turn():
    assert module.in_turn([[7, 8, 9], [4]]) == [7, 4, 8, 9]


def test_what_is_refused_before_a_model_is_loaded(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *rest: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="unknown measure 'probe'; the measures are calibrated, recital"):
        examine_run("run", measures=["probe"])
    with pytest.raises(ValueError, match="guided takes a full and an ablated model; from filtered nothing can be"):
        examine_run("filtered", measures=["recital", "guided"])
    masking = {"strategy": "none"}
    runs["none"] = replace(runs["filtered"], config=config_for(context=32, domains=(), masking=masking))
    with pytest.raises(ValueError, match=r"none has no domain \(masking.domains\): there is nothing to examine"):
        examine_run("none")
    with pytest.raises(ValueError, match=r"unknown split 'validation'|no split 'validation'"):
        examine_run("run", split="validation")
    other = build(tmp_path / "other", [record(n, "en", 40, s) for n in range(4) for s in ("train", "test")])
    runs["elsewhere"] = Subject(runs["filtered"].model, other, runs["filtered"].config)
    with pytest.raises(
        ValueError, match=r"elsewhere was trained on .*other, run on .*corpus: losses are compared on one"
    ):
        examine_run("run", control="elsewhere")
    runs["english"] = Subject(runs["run"].model, other, runs["run"].config)
    with pytest.raises(ValueError, match="no category labelled forget:es with documents in train and test"):
        examine_run("english")
    longer = config_for(context=64, masking={"strategy": "none"})
    runs["longer"] = replace(runs["filtered"], config=longer)
    with pytest.raises(ValueError, match=r"longer has model\.context 64, run 32: their losses are of other sequences"):
        examine_run("run", control="longer")
    with pytest.raises(ValueError, match="the passage 'a' is a single token or none: nothing of it can be predicted"):
        examine_run("run", measures=["recital"], texts=["abc", "a"])
    with pytest.raises(ValueError, match="passages are for the measures recital and guided, which --only leaves out"):
        examine_run("run", measures=["calibrated"], texts=["abc"])
    single = build(tmp_path / "single", [record(0, c, 40, s) for c in ("en", "es") for s in ("train", "test")])
    runs["single"] = replace(runs["run"], corpus=single)
    message = "split test of .*single has 1 document of es with 16 tokens or more, .* the measure context needs two"
    with pytest.raises(ValueError, match=message):
        examine_run("single")


def test_too_little_text_for_a_measure_leaves_the_others(runs, tmp_path):
    single = build(tmp_path / "single", [record(0, c, 40, s) for c in ("en", "es") for s in ("train", "test")])
    runs["single"] = replace(runs["run"], corpus=single)
    assert "recital" in examine_run("single", measures=["recital"])["domains"]["es"]["measures"]


def test_a_sample_that_the_split_does_not_have_is_refused(runs):
    lines: list[str] = []
    examine_run("run", measures=["recital"], sequences=4, log=lines.append)
    assert lines == ["es: recital"]
    with pytest.raises(
        ValueError, match=r"--sequences 40: split test of .* has 11 of es and 11 of en; give at most 11"
    ):
        examine_run("run", measures=["recital"], sequences=40, passages=1, log=lines.append)
    assert lines == ["es: recital"]
    with pytest.raises(
        ValueError, match=r"--fit-sequences 90: split train of .* has .* of es .*, or leave it out for the default"
    ):
        examine_run("run", measures=["calibrated"], fit_sequences=90, log=lines.append)
    with pytest.raises(ValueError, match=r"--passages 90: .* has 16 training documents of es to recite that fill"):
        examine_run("run", measures=["recital"], passages=90, log=lines.append)
    assert lines == ["es: recital"]
    examine_run("run", measures=["recital"], fit_sequences=90, passages=1, log=lines.append)
