"""A study read back from rows: intervals over the seeds, curves, and leakage of models whose leakage is known."""

from __future__ import annotations

import math

import pytest
from studies import loss_of, row, rows, standard, two_sizes, write_rows

from sgtm.sweep.study import Interval, absorptions, differing_settings, interval, leakages, read_study, standard_curve


def study_of(tmp_path, lines):
    return read_study(write_rows(tmp_path / "mine.jsonl", lines))


def test_the_interval_of_three_seeds_is_that_of_students_t():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))  # the quantile of 2 degrees of freedom
    assert interval([1.0, 3.0]).half == pytest.approx(12.706)
    assert interval([5.0]) == Interval(5.0, None) and str(Interval(5.0, None)) == "5.000"
    assert interval([]) is None and interval([1.0, math.nan]) is None
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]).half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    many = interval([0.0, 1.0] * 20)
    assert many.half == pytest.approx(2.262 * 0.5063697 / math.sqrt(40), rel=1e-6)


def test_a_variant_has_the_losses_of_its_seeds_and_the_curve_that_all_share(tmp_path):
    line = row("paper", (3.0, 4.0, 5.0, 6.0))
    del line["seeds"][2]["evaluations"][0]
    (variant,) = study_of(tmp_path, [line]).variants
    assert variant.loss("ablated_forget").mean == pytest.approx(6.0) and variant.served == "ablated"
    ((tokens, retain, forget),) = variant.curve("ablated")
    assert (tokens, retain.mean, forget.mean) == (1000, pytest.approx(5.0), pytest.approx(6.0))
    line["seeds"][0]["ablated_forget"] = None
    assert study_of(tmp_path, [line]).variants[0].loss("ablated_forget") is None
    assert variant.origin == {"device": "a device", "commit": "c0ffee", "time": "2026-11-29T00:00:00Z"}


def test_forget_tokens_without_their_label(tmp_path):
    lines = [row("a", (1, 1, 1, 1), undiscovered=2e5), row("b", (1, 1, 1, 1)), standard(3e4), standard(0.0)]
    assert [variant.undiscovered for variant in study_of(tmp_path, lines).variants] == [2e5, 0.0, 3e4, 0.0]
    lines[0]["trained"]["forget:es"] = {"forget:es": 5e5, "unlabeled": 1e4, "open:es": 3e4, "retain": 6e4}
    assert study_of(tmp_path, lines).variants[0].undiscovered == 1e5, "whatever else they were trained as"
    lines[0]["trained"] = {}
    assert study_of(tmp_path, lines).variants[0].undiscovered is None


def test_leakage_of_models_whose_leakage_is_known(tmp_path):
    by_name = leakages(study_of(tmp_path, rows()).variants)
    assert list(by_name) == ["safe", "ignored", "complete"]
    assert by_name["safe"].tokens == (0.0, 0.0) and by_name["safe"].ratio == (0.0, 0.0)
    assert by_name["ignored"].ratio.mean == pytest.approx(1, rel=0.02)
    assert by_name["complete"].ratio is None and by_name["complete"].tokens.mean == pytest.approx(1e4, rel=0.02)


def test_leakage_of_a_seed_is_read_from_models_of_the_same_seed(tmp_path):
    """A seed's losses are all higher or lower than another's by as much, so that the leakages are equal; without the
    other seeds of the baselines they are not."""
    lines = rows()
    assert leakages(study_of(tmp_path, lines).variants)["ignored"].ratio.half == pytest.approx(0, abs=1e-9)
    for line in lines:
        if not line.get("masks", True):
            line["seeds"] = line["seeds"][1:2]
    assert leakages(study_of(tmp_path, lines).variants)["ignored"].ratio.half > 0.01


def test_no_leakage_where_a_seed_has_no_curve(tmp_path):
    """The model that saw nothing is, in one seed, as good as those that saw most."""
    lines = rows()
    lines[0]["seeds"][1]["full_forget"] = 3.0
    assert leakages(study_of(tmp_path, lines).variants) == {}


def test_leakage_is_read_from_models_of_the_same_shape(tmp_path):
    by_name = leakages(study_of(tmp_path, two_sizes()).variants)
    for name in ("safe", "ignored"):
        assert by_name[f"large-{name}"].ratio.mean == pytest.approx(by_name[name].ratio.mean, rel=0.02), name


def test_rows_of_older_versions_have_the_shape_that_the_defaults_give(tmp_path):
    """A file mixes rows of two versions, and the newer ones have more keys."""
    lines = two_sizes()
    for line in lines[::2]:
        line["settings"] = {"model.experts": 0, "model.tie_embeddings": True} | line.get("settings", {})
    assert leakages(study_of(tmp_path, lines).variants) == leakages(study_of(tmp_path, two_sizes()).variants)
    lines[1]["settings"]["masking.partition"] = "designate"
    differ = differing_settings(study_of(tmp_path, lines).variants).values()
    assert {key for of in differ for key in of} == {"masking.strategy", "model.hidden_size"}
    lines[0]["settings"]["model.experts"] = 4
    assert len({variant.shape for variant in study_of(tmp_path, lines).variants}) == 3


def test_absorption_of_models_whose_absorption_is_known(tmp_path):
    """Half of the knowledge in the group, all of it, none; at half of the training losses are 1.5 times as high."""
    unseen = loss_of(0)
    shares = {"half": 0.5, "all": 1.0, "no": 0.0}
    lines = [row(name, (3.0, unseen - 2, 3.0, unseen - 2 + 2 * share)) for name, share in shares.items()]
    lines.insert(0, standard(0.0))
    by_name = absorptions(study_of(tmp_path, lines).variants)
    for name, share in shares.items():
        assert [point[0] for point in by_name[name]] == [0.5, 1.0]
        assert [point[1].mean for point in by_name[name]] == pytest.approx([share, share], abs=0.02)
    assert absorptions(study_of(tmp_path, lines[1:]).variants) == {}  # nothing to compare with
    lines[1]["seeds"][0]["evaluations"][0]["full_forget"] = 99.0  # no better than the model that has seen none
    assert [share for share, _ in absorptions(study_of(tmp_path, lines).variants)["half"]] == [1.0]


def test_leakage_is_marked_where_a_seed_is_beyond_the_curve(tmp_path):
    beyond = row("mine", (3.0, 3.0, 3.0, loss_of(1e8)), undiscovered=1e5)
    by_name = leakages(study_of(tmp_path, [*rows(), beyond]).variants)
    assert by_name["mine"].extrapolated and not by_name["ignored"].extrapolated


@pytest.mark.parametrize(
    "line", [{"tampered": "a", "seed": 0, "curve": []}, {"examined": "a", "seed": 0, "values": {}}, {"examined": "a"}]
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, line):
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 10: not a row of a sweep's table"):
        study_of(tmp_path, [*rows()[:-1], line])


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mine\.jsonl has no row"):
        study_of(tmp_path, [])


def test_settings_of_a_grid_are_no_variants(tmp_path):
    setting = {"method": "rmu", "options": {}, "factor": 1.0, "retain": 4.0, "forget": 5.0, "chosen": True}
    assert len(study_of(tmp_path, [*rows(), setting]).variants) == 8


def test_no_curve_without_a_model_that_saw_nothing(tmp_path):
    lines = [standard(tokens) for tokens in (1e4, 3e4, 1e5)]
    assert standard_curve(study_of(tmp_path, lines).variants) is None
    assert leakages(study_of(tmp_path, [*lines, row("a", (1, 1, 1, 1), undiscovered=9.0)]).variants) == {}
    assert standard_curve(study_of(tmp_path, [*lines, standard(0.0)]).variants).unseen == pytest.approx(7.0)


def test_a_baseline_of_another_length_is_not_on_the_curve(tmp_path):
    longer = standard(0.0) | {"trained": {"retain": {"retain": 3e6}}}
    assert list(leakages(study_of(tmp_path, [*rows(), longer]).variants)) == ["safe", "ignored", "complete"]


def test_settings_in_which_variants_differ(tmp_path):
    lines = [row("a", (1, 1, 1, 1)), standard(0.0)]
    lines[1]["settings"]["train.seed"] = 5
    assert differing_settings(study_of(tmp_path, lines).variants) == {
        "a": {"masking.strategy": "sgtm"},
        "standard-0": {"masking.strategy": "none"},
    }


def test_a_folder_has_the_table_of_its_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("sgtm.sweep.study.tamper_rows", lambda folder: [{"tampered": "a", "folder": folder}])
    line = row("a", (1, 1, 1, 1)) | {"finished": 1}
    unfinished = row("b", (1, 1, 1, 1), seeds=0)
    write_rows(tmp_path / "table.jsonl", [line, unfinished])
    study = read_study(tmp_path)
    assert [variant.name for variant in study.variants] == ["a"]
    assert study.tampered == ({"tampered": "a", "folder": tmp_path},)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"variant": "a", "seeds": [1]}'])
def test_a_damaged_file_is_an_error_with_its_line(tmp_path, text):
    file = tmp_path / "mine.jsonl"
    write_rows(file, [standard(0.0)])
    file.write_text(file.read_text() + text + "\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: not a row of a sweep's table\.jsonl"):
        read_study(file)


def test_a_folder_without_a_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"table\.jsonl: No such file or directory; `sgtm sweep FILE\.yaml --table`"):
        read_study(tmp_path)
