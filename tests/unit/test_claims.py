"""The claims of the papers: what is measured of constructed rows, and when a claim counts as confirmed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from studies import loss_of, row, rows, tampered, two_sizes, write_rows

from sgtm.sweep.study import Interval, read_study

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def claims(benchmarks):
    import claims

    return claims


@pytest.fixture
def measures(benchmarks):
    import claim_measures

    return claim_measures


def study_of(tmp_path, lines):
    return read_study(write_rows(tmp_path / "mine.jsonl", lines))


@pytest.mark.parametrize(
    ("below", "mean", "half", "expected"),
    [
        (True, 0.5, 0.4, "**confirmed**"),
        (True, 0.5, 0.6, "undecided"),
        (True, 1.5, 0.4, "**refuted**"),
        (False, 1.5, 0.4, "**confirmed**"),
        (False, 1.5, 0.6, "undecided"),
        (False, 0.5, 0.4, "**refuted**"),
        (False, 1.5, None, "not tested: one seed"),
    ],
)
def test_a_claim_is_decided_where_the_whole_interval_is_on_one_side(claims, below, mean, half, expected):
    claim = claims.Claim("P", "text", "quantity", 1.0, below, lambda study: [])
    assert claims.verdict(claim, Interval(mean, half)) == expected


def test_a_difference_is_paired_by_seed(measures, tmp_path):
    lines = [row("a", (1.0, 2.0, 3.0, 4.0)), row("b", (1.0, 2.0, 3.0, 3.5), seeds=2)]
    lines[0]["seeds"].reverse()
    measure = measures.difference(("a", "ablated_forget"), ("b", "ablated_forget"))
    assert sorted(measure(study_of(tmp_path, lines))) == pytest.approx([0.495, 0.495])  # seeds 0 and 1
    with pytest.raises(measures.Missing):
        measures.difference(("a", "full_retain"), ("c", "full_retain"))(study_of(tmp_path, lines))


def test_the_error_of_a_line_covers_the_finished_models_of_other_lengths(measures):
    """Of the novels: baselines of 450 steps, beside the line of those of 600."""
    study = read_study(RESULTS / "cpu-epyc-2c" / "claims.jsonl")
    by_name = {variant.name: variant for variant in study.variants}
    errors = []
    for baseline in ("unmasked", "filtered"):
        (short,) = by_name[f"{baseline}-450"].seeds
        for seed in by_name[baseline].seeds:
            line = sorted((e["full_retain"], e["full_forget"]) for e in seed["evaluations"])
            errors.append(short["full_forget"] - float(np.interp(short["full_retain"], *zip(*line, strict=True))))
    assert 0.01 < max(map(abs, errors)) <= measures.LINE_ERROR


def test_an_error_of_the_measure_widens_the_interval(claims):
    claim = claims.Claim("P", "text", "quantity", 0.0, False, lambda study: [])
    assert claims.verdict(claim, Interval(0.02, 0.003), 0.1) == "undecided"
    assert claims.verdict(claim, Interval(0.02, 0.003)) == "**confirmed**"
    assert claims.verdict(claim, Interval(-0.2, 0.05), 0.1) == "**refuted**"


def test_spill_is_the_rise_on_adjacent_data_beyond_that_on_retained_data(measures, tmp_path):
    """Ablation raises retained data from 1 to 3, adjacent data from 1.5 to 4: half a nat more."""
    line = row("mine", (1.0, 1.0, 3.0, 8.0))
    for seed in line["seeds"]:
        seed |= {"full_adjacent": seed["full_retain"] + 0.5, "ablated_adjacent": seed["ablated_retain"] + 1.0}
    assert measures.spill("mine")(study_of(tmp_path, [line])) == pytest.approx([0.5] * 3)


def of_steps(line: dict, steps: int) -> dict:
    return {**line, "settings": {**line["settings"], "train.steps": steps}}


def test_another_variant_is_read_at_the_same_retain_loss(measures, tmp_path):
    """Its losses fall on a line from (4.5, 9) to (3, 6), so at a retain loss of 3.5 its forget loss is 7."""
    lines = [row("weak", (3.0, 6.0, 3.0, 6.0), masks=False, undiscovered=1e5), row("mine", (1.0, 1.0, 3.5, 8.0))]
    study = study_of(tmp_path, lines)
    assert measures.at_equal_retain("mine", "weak")(study)[1] == pytest.approx(1.0)
    assert not measures.off_the_line("mine", "weak")(study)
    masked = [row("other", (9.0, 9.0, 3.0, 6.0)), lines[1]]  # of a masked one the ablated losses
    assert measures.at_equal_retain("mine", "other")(study_of(tmp_path, masked))[1] == pytest.approx(1.0)
    assert measures.line_error("mine", "weak")(study) == measures.LINE_ERROR
    lengths = [of_steps(row(f"weak-{n}", (3.0 + m, 8.0 + m, 3.0, 6.0), masks=False), n) for m, n in ((1, 5), (2, 7))]
    finished = study_of(tmp_path, [*lines, *lengths, row("weak-4", (3.5, 1.0, 1.0, 1.0), masks=False)])
    assert measures.at_equal_retain("mine", "weak")(finished)[1] == pytest.approx(8 - 7.5)  # from (3, 6) to (4, 9)
    assert measures.line_error("mine", "weak")(finished) == 0
    lengths[0]["seeds"] = lengths[0]["seeds"][:2]
    assert measures.line_error("mine", "weak")(study_of(tmp_path, [*lines, *lengths])) == measures.LINE_ERROR
    lines[1] = row("mine", (1.0, 1.0, 2.0, 8.0))  # better than the filter ever was
    study = study_of(tmp_path, lines)
    assert measures.at_equal_retain("mine", "weak")(study)[1] == pytest.approx(2.0)
    assert measures.off_the_line("mine", "weak")(study)
    lines[0]["seeds"] = lines[0]["seeds"][:2]
    assert len(measures.at_equal_retain("mine", "weak")(study_of(tmp_path, lines))) == 2


def test_leakage_of_each_seed(measures, tmp_path):
    ratios = measures.leakage_of("ignored")(study_of(tmp_path, rows()))
    assert ratios == pytest.approx([1, 1, 1], rel=0.02)
    assert measures.leakage_of("complete")(study_of(tmp_path, rows())) == []


def test_added_leakage_is_beyond_that_with_all_labels(measures, tmp_path):
    """All of 1e5 undiscovered tokens, less the 1e4 that the model with complete labels is worth."""
    _, middle, _ = measures.added_leakage("ignored", "complete")(study_of(tmp_path, rows()))
    assert middle == pytest.approx(0.9, rel=0.03)
    with pytest.raises(measures.Missing, match="a curve of filtered models"):
        measures.added_leakage("ignored", "complete")(study_of(tmp_path, rows()[2:]))


def test_leakage_that_falls_with_size_has_a_negative_slope(measures, tmp_path):
    """A tenth at a million parameters and nothing at four: the line falls by 0.1 in log10(4)."""
    lines = two_sizes()
    leaks = row("small", (3.1, 3.2, 3.3, loss_of(1e5)), undiscovered=1e6)
    study = study_of(tmp_path, [*lines, leaks])
    slopes = measures.change_with_size(["small", "large-safe"])(study)
    assert len(slopes) == 3 and slopes[1] == pytest.approx(-0.1 / math.log10(4), rel=0.05)
    with pytest.raises(measures.Missing):
        measures.change_with_size(["small", "medium", "large-safe"])(study)


def test_a_penalty_is_the_rest_of_the_baselines_training(measures, tmp_path):
    """Baselines on L = 3 C ** -1/2: the loss of 0.81 of the whole costs 19 %."""
    lines = [
        of_steps(row(f"unmasked{end}", (3 * share**-0.5, 5.0, 3.0, 5.0), masks=False), int(1000 * share))
        | {"tokens": int(1000 * share)}
        for end, share in (("-500", 0.5), ("", 1.0), ("-1500", 1.5))
    ]
    lines += [row("unmasked-x", (9.0, 9.0, 9.0, 9.0), masks=False), row("mine", (3 / 0.9, 5.0, 5.0, 5.0))]
    study = study_of(tmp_path, lines)
    assert measures.penalty("mine", "full_retain", "unmasked")(study)[1] == pytest.approx(19, abs=0.1)
    assert not measures.beyond("mine", "full_retain", "unmasked")(study)
    for line in (lines[0], lines[2]):  # lengths of one seed alone: the curve goes through each seed's own whole length
        line["seeds"] = line["seeds"][1:2]
    study = study_of(tmp_path, lines)
    assert measures.penalty("mine", "full_retain", "unmasked")(study) == pytest.approx([19, 19, 19], abs=0.3)
    assert measures.beyond("unmasked-x", "full_retain", "unmasked")(study)
    with pytest.raises(measures.Missing):
        measures.penalty("mine", "full_retain", "unmasked")(study_of(tmp_path, lines[1:]))


def test_attacks_are_compared_after_the_same_steps_and_tokens(measures, tmp_path):
    """Losses of 7, 6, 5 against 8, 6.5, 4 of the other: furthest below it after one step."""
    other = tampered("other", seed=1, start=8.0)
    for point, loss in zip(other["curve"], (8.0, 6.5, 4.0), strict=True):
        point["forget"] = loss
    study = study_of(tmp_path, [*rows(), other])
    assert measures.attacked("paper", "other", 2)(study) == [1.0]  # seed 1 of both
    assert measures.attacked("paper", "other")(study) == [-0.5]
    other["curve"].append({"step": 65, "tokens": 0, "forget": 0.0, "error": 0.1, "retain": 3.0})
    assert measures.attacked("paper", "other", 2)(study_of(tmp_path, [*rows(), other])) == [1.0]  # beyond STEPS
    with pytest.raises(measures.Missing, match="attacks of 4 steps"):
        measures.attacked("paper", "other", 4)(study)
    with pytest.raises(measures.Missing, match="unmasked"):
        measures.attacked("paper", "unmasked + rmu")(study)
    other["attacks"] = ["forget, lr 1"]
    with pytest.raises(measures.Missing, match="the same attacks on paper and other"):
        measures.attacked("paper", "other", 2)(study_of(tmp_path, [*rows(), other]))
    del other["attacks"]
    other["curve"][2]["tokens"] = 9  # steps of other sizes are not compared
    with pytest.raises(measures.Missing, match="of the same steps and tokens"):
        measures.attacked("paper", "other", 2)(study_of(tmp_path, [*rows(), other]))


def test_relearning_counts_steps_to_the_loss_of_the_baseline(measures, tmp_path):
    """Losses of 8, 7, 6 at steps 0, 1, 2: half-way to 7 after sqrt(2) - 1 steps, which counts as half a step."""
    baseline = tampered("unmasked", start=6.5)
    lines = [baseline, tampered("slow", start=9.0), tampered("quick", start=8.0), tampered("known", start=6.5)]
    assert measures.steps_to(lines[2]["curve"], 7.0) == pytest.approx(1.0)
    assert measures.steps_to(lines[2]["curve"], 6.5) == pytest.approx(6**0.5 - 1)
    assert measures.steps_to(lines[2]["curve"], 7.5) == 0.5 == measures.steps_to(lines[3]["curve"], 7.0)
    assert measures.steps_to(lines[1]["curve"], 6.5) is None
    study = study_of(tmp_path, [*rows()[:-2], *lines])
    (ratio,) = measures.relearning("slow", "quick")(study)
    assert ratio == pytest.approx(math.log2(64 / (6**0.5 - 1)))
    assert measures.unreached("slow")(study) and not measures.unreached("quick")(study)
    with pytest.raises(measures.Missing, match="slow within 64 steps"):
        measures.relearning("quick", "slow")(study)


def test_examinations_are_compared_for_every_seed(measures, tmp_path):
    lines = [
        {"examined": name, "seed": seed, "domain": "es", "values": {"gain": {"full": gain, "control": 0.5 * seed}}}
        for name, seed, gain in (("mine", 0, 1.0), ("mine", 1, 2.0), ("other", 0, 9.0))
    ]
    study = study_of(tmp_path, [*rows(), *lines])
    assert measures.examined("mine", ("gain", "full"), ("gain", "control"))(study) == [1.0, 1.5]
    for name, number in (("none", "gain"), ("mine", "loss")):
        with pytest.raises(measures.Missing):
            measures.examined(name, (number, "full"), ("gain", "control"))(study)


def test_a_lower_bound_refutes_nothing(claims, measures, tmp_path):
    study = study_of(tmp_path, rows())
    bound = claims.Claim("P", "text", "steps", 1.0, False, lambda study: [0.1, 0.2, 0.15], at_least=lambda study: True)
    assert claims._measured(bound, study) == (": at least 0.150 ± 0.124 nats", "undecided")
    assert claims._measured(bound._replace(at_least=lambda study: False), study)[1] == "**refuted**"
    assert claims._measured(bound._replace(limit=0.0), study)[1] == "**confirmed**"


def test_every_claim_has_a_row_with_what_was_measured(claims, tmp_path):
    lines = [*rows(), row("paper-undiscovered", (3.1, 3.2, 3.3, loss_of(0)), undiscovered=1e5)]
    table = claims.section({"claims": study_of(tmp_path, lines)}).splitlines()[-len(claims.CLAIMS) :]
    assert [line.split(" | ")[1] for line in table] == [claim.text for claim in claims.CLAIMS]
    (leaks,) = (line for line in table if "all that the ablated" in line and line.startswith("| P "))
    assert "leakage: 0.0" in leaks and leaks.endswith("| < 0.1 | **confirmed** | `claims` |")
    assert sum("| not tested: " in line for line in table) == len(claims.CLAIMS) - 1
