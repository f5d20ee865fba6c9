"""The claims of the papers: what is measured of constructed rows, and when a claim counts as confirmed."""

from __future__ import annotations

import math
import re

import pytest
from studies import loss_of, row, rows, standard, tampered, two_sizes, write_rows

from sgtm.sweep.study import Interval, Study, read_study


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
        (True, 0.5, 0.4, "confirmed"),
        (True, 0.5, 0.6, "undecided"),
        (True, 1.5, 0.4, "refuted"),
        (False, 1.5, 0.4, "confirmed"),
        (False, 1.5, 0.6, "undecided"),
        (False, 0.5, 0.4, "refuted"),
        (False, 1.5, None, "not tested: one seed"),
    ],
)
def test_a_claim_is_decided_where_the_whole_interval_is_on_one_side(claims, below, mean, half, expected):
    claim = claims.Claim("P", "text", "quantity", 1.0, below, lambda study: None)
    assert claims.verdict(claim, Interval(mean, half)) == expected


def test_a_difference_is_paired_by_seed(measures, tmp_path):
    lines = [row("a", (1.0, 2.0, 3.0, 4.0)), row("b", (1.0, 2.0, 3.0, 3.5), seeds=2)]
    lines[0]["seeds"].reverse()
    measure = measures.difference(("a", "ablated_forget"), ("b", "ablated_forget"))
    assert sorted(measure(study_of(tmp_path, lines)).values) == pytest.approx([0.495, 0.495])  # seeds 0 and 1
    with pytest.raises(measures.Missing):
        measures.difference(("a", "full_retain"), ("c", "full_retain"))(study_of(tmp_path, lines))


def test_an_error_of_the_measure_widens_the_interval(claims):
    claim = claims.Claim("P", "text", "quantity", 0.0, False, lambda study: None)
    assert claims.verdict(claim, Interval(0.02, 0.003), 0.1) == "undecided"
    assert claims.verdict(claim, Interval(0.02, 0.003)) == "confirmed"
    assert claims.verdict(claim, Interval(-0.2, 0.05), 0.1) == "refuted"


def test_spill_is_the_rise_on_adjacent_data_beyond_that_on_other_text(measures, tmp_path):
    """Ablation raises retained data by 2, 3 and 4 nats, adjacent data by half a nat more, forgotten data by 8: more by
    6, 5 and 4, of which a quarter counts."""
    line = row("mine", (1.0, 1.0, 3.0, 9.0))
    for number, seed in enumerate(line["seeds"]):
        seed["ablated_retain"] += number
        seed |= {"full_adjacent": 1.5, "ablated_adjacent": 4.0 + number}
    assert measures.spill("mine")(study_of(tmp_path, [line])).values == pytest.approx([-1.0, -0.75, -0.5])
    for seed in line["seeds"]:
        seed |= {f"ablated_{data}": seed[f"full_{data}"] for data in ("retain", "adjacent", "forget")}
    assert measures.spill("mine")(study_of(tmp_path, [line])).values == [0, 0, 0], "a model that removes nothing"


def of_steps(line: dict, steps: int) -> dict:
    return {**line, "settings": {**line["settings"], "train.steps": steps}}


def test_another_variant_is_read_at_the_same_retain_loss(measures, tmp_path):
    """Its losses fall on a line from (4.5, 9) to (3, 6), so at a retain loss of 3.5 its forget loss is 7."""
    lines = [row("weak", (3.0, 6.0, 3.0, 6.0), masks=False, undiscovered=1e5), row("mine", (1.0, 1.0, 3.5, 8.0))]
    study = study_of(tmp_path, lines)
    assert measures.at_equal_retain("mine", "weak")(study).values[1] == pytest.approx(1.0)
    assert not measures.at_equal_retain("mine", "weak")(study).outside
    masked = [row("other", (9.0, 9.0, 3.0, 6.0)), lines[1]]  # of a masked one the ablated losses
    assert measures.at_equal_retain("mine", "other")(study_of(tmp_path, masked)).values[1] == pytest.approx(1.0)
    assert measures.at_equal_retain("mine", "weak")(study).error == measures.LINE_ERROR
    lengths = [of_steps(row(f"weak-{n}", (3.0 + m, 8.0 + m, 3.0, 6.0), masks=False), n) for m, n in ((1, 5), (2, 7))]
    finished = study_of(tmp_path, [*lines, *lengths, row("weak-4", (3.5, 1.0, 1.0, 1.0), masks=False)])
    assert measures.at_equal_retain("mine", "weak")(finished).values[1] == pytest.approx(
        8 - 7.5
    )  # from (3, 6) to (4, 9)
    assert measures.at_equal_retain("mine", "weak")(finished).error == 0
    for each in (*lines, *lengths):
        each["settings"]["train.eval_sequences"] = 600
    assert measures.at_equal_retain("mine", "weak")(study_of(tmp_path, [*lines, *lengths])).error == 0
    lengths[1]["settings"]["train.eval_sequences"] = "all"
    error = measures.at_equal_retain("mine", "weak")(study_of(tmp_path, [*lines, *lengths])).error
    assert error == measures.SAMPLE_ERROR > 0, "of another number of sequences"
    for each in (*lines, *lengths):
        del each["settings"]["train.eval_sequences"]
    lengths[0]["seeds"] = lengths[0]["seeds"][:2]
    assert measures.at_equal_retain("mine", "weak")(study_of(tmp_path, [*lines, *lengths])).error == measures.LINE_ERROR
    lines[1] = row("mine", (1.0, 1.0, 2.0, 8.0))  # better than the filter ever was
    study = study_of(tmp_path, lines)
    assert measures.at_equal_retain("mine", "weak")(study).values[1] == pytest.approx(2.0)
    assert measures.at_equal_retain("mine", "weak")(study).outside
    lines[0]["seeds"] = lines[0]["seeds"][:2]
    assert len(measures.at_equal_retain("mine", "weak")(study_of(tmp_path, lines)).values) == 2
    for length in lengths:
        length["seeds"] = length["seeds"][:2]
    compared = measures.at_equal_retain("mine", "weak")(study_of(tmp_path, [*lines, *lengths]))
    assert len(compared.values) == 2 and compared.error == 0, "a seed that the other lacks is not read from any line"


def test_each_seed_is_read_from_the_line_of_its_own(measures, tmp_path):
    """The other's forget losses are 0, 1 and 3 nats above the line, by seed; ours come in another order."""
    lines = [row("weak", (3.0, 6.0, 3.0, 6.0), masks=False), row("mine", (1.0, 1.0, 3.5, 8.0))]
    for seed, nats in zip(lines[0]["seeds"], (0.0, 1.0, 3.0), strict=True):
        for each in (seed, *seed["evaluations"]):
            each["full_forget"] += nats
    lines[1]["seeds"].reverse()
    paired = measures.at_equal_retain("mine", "weak")(study_of(tmp_path, lines)).values
    assert paired == pytest.approx([1 - 3, 1 - 1, 1], abs=0.03)


def test_leakage_of_each_seed(measures, tmp_path):
    ratios = measures.leakage_of("ignored")(study_of(tmp_path, rows())).values
    assert ratios == pytest.approx([1, 1, 1], rel=0.02)
    assert measures.leakage_of("complete")(study_of(tmp_path, rows())).values == []
    lines = rows()
    ignored = next(line for line in lines if line["variant"] == "ignored")
    ignored["seeds"][0]["ablated_forget"] = loss_of(5e4)  # half of what was undiscovered
    assert measures.leakage_of("ignored")(study_of(tmp_path, lines)).values == pytest.approx([0.5, 1, 1], rel=0.03)


def test_added_leakage_is_beyond_that_with_all_labels(measures, tmp_path):
    """All of 1e5 undiscovered tokens, less the 1e4 that the model with complete labels is worth."""
    _, middle, _ = measures.added_leakage("ignored", "complete")(study_of(tmp_path, rows())).values
    assert middle == pytest.approx(0.9, rel=0.03)
    with pytest.raises(measures.Missing, match="a curve of filtered models"):
        measures.added_leakage("ignored", "complete")(study_of(tmp_path, rows()[2:]))


def test_leakage_that_falls_with_size_has_a_negative_slope(measures, tmp_path):
    """A tenth at a million parameters and nothing at four: the line falls by 0.1 in log10(4)."""
    lines = two_sizes()
    leaks = row("small", leak_of(1e5), undiscovered=1e6)
    study = study_of(tmp_path, [*lines, leaks])
    slopes = measures.change_with_size(["small", "large-safe"])(study).values
    assert len(slopes) == 3 and slopes[1] == pytest.approx(-0.1 / math.log10(4), rel=0.05)
    whole = measures.CURVE_ERROR * 0.1 / math.log10(4)  # a tenth, and nothing at four million
    for count in (1, 2, 3):
        lines[0] = standard(0.0)
        lines[0]["seeds"] = lines[0]["seeds"][3 - count :]
        error = measures.change_with_size(["small", "large-safe"])(study_of(tmp_path, [*lines, leaks])).error
        assert error == pytest.approx(whole / math.sqrt(count), rel=0.05), count
    above = {**lines[3], "seeds": lines[3]["seeds"][:1]}  # saw 1e5 tokens: as many as leak
    most = {**lines[4], "seeds": lines[4]["seeds"][:1]}
    for replaced, count in (([above, lines[4]], 1), ([lines[3], most], 3)):
        fewer = study_of(tmp_path, [*lines[:3], *replaced, *lines[5:], row("small", leak_of(9e4), undiscovered=1e6)])
        error = measures.change_with_size(["small", "large-safe"])(fewer).error
        assert error == pytest.approx(0.9 * whole / math.sqrt(count), rel=0.05), "of the models that are read alone"
    with pytest.raises(measures.Missing, match="with the same seeds"):
        measures.change_with_size(["small", "large-safe"])(
            study_of(tmp_path, [*lines, {**leaks, "seeds": leaks["seeds"][1:]}])
        )
    with pytest.raises(measures.Missing, match="a curve of filtered models for small"):
        measures.change_with_size(["small", "large-safe"])(study_of(tmp_path, [*lines[1:], leaks]))
    with pytest.raises(measures.Missing):
        measures.change_with_size(["small", "medium", "large-safe"])(study)


def leak_of(tokens: float) -> tuple[float, ...]:
    return 3.1, 3.2, 3.3, loss_of(tokens)


def test_a_penalty_is_the_rest_of_the_baselines_training(measures, tmp_path):
    """Baselines on L = 3 C ** -1/2: the loss of 0.81 of the whole costs 19 %."""
    lines = [
        of_steps(row(f"unmasked{end}", (3 * share**-0.5, 5.0, 3.0, 5.0), masks=False), int(1000 * share))
        | {"tokens": int(1000 * share)}
        for end, share in (("-500", 0.5), ("", 1.0), ("-1500", 1.5))
    ]
    lines += [row("unmasked-x", (9.0, 9.0, 9.0, 9.0), masks=False), row("mine", (3 / 0.9, 5.0, 5.0, 5.0))]
    study = study_of(tmp_path, lines)
    assert measures.penalty("unmasked-x", "full_retain", "unmasked")(study).values == [50, 50, 50], (
        "of half of the training"
    )
    assert measures.penalty("unmasked-x", "full_retain", "unmasked")(study).at_least
    assert not measures.penalty("mine", "full_retain", "unmasked")(study).at_least
    assert measures.penalty("mine", "full_retain", "unmasked")(study).values[1] == pytest.approx(19, abs=0.1)
    assert not measures.penalty("mine", "full_retain", "unmasked")(study).outside
    for line in (lines[0], lines[2]):  # lengths of one seed alone: the curve goes through each seed's own whole length
        line["seeds"] = line["seeds"][1:2]
    study = study_of(tmp_path, lines)
    assert measures.penalty("mine", "full_retain", "unmasked")(study).values == pytest.approx([19, 19, 19], abs=0.3)
    assert measures.penalty("unmasked-x", "full_retain", "unmasked")(study).outside
    with pytest.raises(measures.Missing):
        measures.penalty("mine", "full_retain", "unmasked")(study_of(tmp_path, lines[1:]))


def test_attacks_are_compared_after_the_same_steps(measures, tmp_path):
    """Losses of 7, 6, 5 against 8, 6.5, 4 of the other, after 0, 1 and 2 steps."""
    other = tampered("other", seed=1, losses=(8.0, 6.5, 4.0))
    study = study_of(tmp_path, [*rows(), other])
    assert measures.attacked("paper", "other", 2)(study).values == [1.0]  # seed 1 of both
    assert measures.attacked("paper", "other")(study).values == [(-0.5 + 1.0) / 2], "step 0 is before any attack"
    beyond = [
        *rows()[:-1],
        tampered(seed=1, losses=(7.0, *[6.0] * 6, 5.5, 0.0)),
        tampered("other", 1, (8.0, *[6.5] * 8)),
    ]
    assert measures.attacked("paper", "other")(study_of(tmp_path, beyond)).values == [
        (-0.5 * 6 - 1.0) / 7
    ]  # 64 steps, not 128
    with pytest.raises(measures.Missing, match="attacks of 4 steps"):
        measures.attacked("paper", "other", 4)(study)
    with pytest.raises(measures.Missing, match="unmasked"):
        measures.attacked("paper", "unmasked + rmu")(study)
    for key in ("tokens", "sequences"):
        changed = study_of(tmp_path, [*rows(), {**other, key: 7}])
        with pytest.raises(measures.Missing, match="the same attacks on paper and other, measured on the same text"):
            measures.attacked("paper", "other", 2)(changed)


def test_the_worst_case_is_of_the_attacks_that_both_went_through(measures, tmp_path):
    """The other's second attack is stronger, but paper was not attacked so; the third raises the loss again."""
    other = tampered("other", losses=(8.0, 6.5, 6.2))
    other["attacks"]["stronger"] = [(0, 8.0), (1, 1.0), (2, 1.0)]
    paper = tampered(losses=(8.0, 7.0, 7.0))
    for row_, losses in ((other, (8.0, 5.5, 9.0)), (paper, (8.0, 6.0, 9.0))):
        row_["attacks"]["early"] = list(enumerate(losses))
    study = study_of(tmp_path, [*rows()[:-2], other, paper])
    assert (
        measures.attacked("paper", "other", 1)(study).values
        == measures.attacked("paper", "other", 2)(study).values
        == [0.5]
    )
    study = study_of(tmp_path, [*rows()[:-2], tampered("other", attack="one"), tampered(attack="two")])
    with pytest.raises(measures.Missing, match="the same attacks"):
        measures.attacked("paper", "other", 2)(study)


def test_relearning_counts_steps_to_the_loss_of_the_baseline(measures, tmp_path):
    """Losses of 8, 7, 6 at steps 0, 1, 2: half-way to 7 after sqrt(2) - 1 steps, which counts as half a step."""
    falling = {0: 8.0, 1: 7.0, 2: 6.0}
    assert measures.steps_to(falling, 7.0) == pytest.approx(1.0)
    assert measures.steps_to(falling, 6.5) == pytest.approx(6**0.5 - 1)
    assert measures.steps_to(falling, 7.5) == 0.5 == measures.steps_to({0: 6.5, 1: 5.5}, 7.0)
    assert measures.steps_to({0: 6.5, 1: 6.5}, 6.5) == 0.5
    assert measures.steps_to({0: 9.0, 1: 8.0, 2: 7.0}, 6.5) is None
    slow, quick = tampered("slow", losses=(9.0, 8.0, 7.0)), tampered("quick", losses=(8.0, 7.0, 6.0))
    study = study_of(tmp_path, [*rows()[:-2], tampered("unmasked", losses=(6.5,)), slow, quick])
    (ratio,) = measures.relearning("slow", "quick")(study).values
    assert ratio == pytest.approx(math.log2(2 / (6**0.5 - 1))), "nothing is known of `slow` after 2 steps"
    long = tampered("slow", losses=(*[9.0] * 8, 6.0)), tampered("quick", losses=(8.0, 7.0, *[6.0] * 7))  # 128 steps
    within, later = (
        measures.relearning("slow", "quick", steps)(
            study_of(tmp_path, [tampered("unmasked", losses=(6.5,)), *long])
        ).values
        for steps in (64, 256)
    )
    assert within == pytest.approx([math.log2(64 / (6**0.5 - 1))]), "it reaches the loss later"
    assert 64 < 2 ** later[0] * (6**0.5 - 1) < 128
    assert measures.relearning("slow", "quick")(study).at_least
    with pytest.raises(measures.Missing, match="slow within 64 steps"):
        measures.relearning("quick", "slow")(study)
    more = [tampered("unmasked", 1, (7.0,)), tampered("slow", 1, (9.0, 8.0, 7.0)), tampered("quick", 1, (8.0, 7.0))]
    both = study_of(tmp_path, [tampered("unmasked", losses=(6.5,)), slow, quick, *more])
    targets = [math.log2(2 / (6**0.5 - 1)), math.log2(2)]  # each seed to the loss of its own baseline
    assert measures.relearning("slow", "quick")(both).values == pytest.approx(targets)
    quick_alone = study_of(tmp_path, [tampered("unmasked", losses=(7.0,)), slow, quick, *more[1:], more[0]])
    assert not measures.relearning("slow", "quick")(quick_alone).at_least
    lower = [tampered("unmasked", 1, (6.9,)), more[1], tampered("quick", 1, (8.0, 6.0))]
    assert measures.relearning("slow", "quick")(
        study_of(tmp_path, [tampered("unmasked", losses=(7.0,)), slow, quick, *lower])
    ).at_least


def test_one_seed_that_is_off_a_curve_marks_the_claim(measures, tmp_path):
    """Each of the three measures: the others of its seeds are inside."""
    lines = [row("weak", (3.0, 6.0, 3.0, 6.0), masks=False, undiscovered=1e5), row("mine", (1.0, 1.0, 3.5, 8.0))]
    lines[1]["seeds"][1]["ablated_retain"] = 2.0
    assert measures.at_equal_retain("mine", "weak")(study_of(tmp_path, lines)).outside
    lines = [
        of_steps(row(f"unmasked{end}", (loss, 5.0, 3.0, 5.0), masks=False), steps) | {"tokens": steps}
        for end, loss, steps in (("-500", 4.0, 500), ("", 3.0, 1000), ("-1500", 2.5, 1500))
    ]
    mine = row("mine", (3.5, 5.0, 5.0, 5.0))
    study = study_of(tmp_path, [*lines, mine])
    assert not measures.penalty("mine", "full_retain", "unmasked")(study).outside
    mine["seeds"][1]["full_retain"] = 4.5
    compared = measures.penalty("mine", "full_retain", "unmasked")(study_of(tmp_path, [*lines, mine]))
    assert compared.outside and compared.at_least
    attacks = [tampered("unmasked", seed, (6.5,)) for seed in (0, 1)]
    attacks += [tampered("quick", seed) for seed in (0, 1)]
    attacks += [tampered("mine", 0, (9.0, 8.0, 7.0)), tampered("mine", 1)]
    assert measures.relearning("mine", "quick")(study_of(tmp_path, [*rows()[:-2], *attacks])).at_least


def test_a_length_without_the_seed_is_moved_by_the_seeds_own_whole_length(measures, tmp_path):
    """Seeds half a nat apart, and so are their curves: each has the penalty of its own."""
    lines = [
        of_steps(row(f"unmasked{end}", (3 * share**-0.5, 5.0, 3.0, 5.0), masks=False), int(1000 * share))
        | {"tokens": int(1000 * share)}
        for end, share in (("-500", 0.5), ("", 1.0), ("-1500", 1.5))
    ]
    mine = row("mine", (3 / 0.9, 5.0, 5.0, 5.0))
    for number in range(3):
        lines[1]["seeds"][number]["full_retain"] = 3 + 0.5 * number
        mine["seeds"][number]["full_retain"] = 3 / 0.9 + 0.5 * number
    for line in (lines[0], lines[2]):
        line["seeds"] = line["seeds"][:1]
        line["seeds"][0]["full_retain"] = 3 * (line["tokens"] / 1000) ** -0.5
    penalties = measures.penalty("mine", "full_retain", "unmasked")(study_of(tmp_path, [*lines, mine])).values
    assert penalties == pytest.approx([19, 19, 19], abs=0.5)


def test_examinations_are_compared_for_every_seed(measures, tmp_path):
    lines = [
        {"examined": name, "seed": seed, "domain": "es", "values": {"gain": {"full": gain, "control": 0.5 * seed}}}
        for name, seed, gain in (("mine", 0, 1.0), ("mine", 1, 2.0), ("other", 0, 9.0))
    ]
    study = study_of(tmp_path, [*rows(), *lines])
    assert measures.examined("mine", ("gain", "full"), ("gain", "control"))(study).values == [1.0, 1.5]
    for name, number in (("none", "gain"), ("mine", "loss")):
        with pytest.raises(measures.Missing):
            measures.examined(name, (number, "full"), ("gain", "control"))(study)
    again = study_of(tmp_path, [*rows(), *lines, {**lines[0], "split": "train"}])
    with pytest.raises(measures.Missing, match="one examination of mine for each seed"):
        measures.examined("mine", ("gain", "full"), ("gain", "control"))(again)


def test_the_commands_take_the_measures_that_the_claims_read(claims, measures, benchmarks):
    """Of the examinations: their numbers are named as sgtm/report/examination.py does."""
    import experiments

    from sgtm.report.examination import ROWS

    (only,) = set(re.findall(r"--only ([a-z ]+)", experiments.EXPERIMENTS["claims"].commands))
    taken = {
        "quantised": {bits: {"es": {"value": 1.0}} for bits in ("unrounded", "8", "4")},
        "context": {"es": {"gain": {"value": 1.0}}},
    }
    named = [name for measure in only.split() for name, _ in ROWS[measure]({"full": taken[measure]}, ["es"])]
    values = {name: {"without es": 2.0, "control": 1.0} for name in named}
    examined = [{"examined": name, "seed": 0, "values": values} for name in ("paper", "dual")]
    study = Study("mine", (), (), tuple(examined))
    mine = [claim for claim in claims.CLAIMS if "gain by" in claim.quantity or "bits" in claim.quantity]
    assert [claim.measure(study).values for claim in mine] == [[1.0], [1.0], [0.0], [0.0]]


def claim_of(claims, measures, values, limit=1.0, below=False, **about):
    measured = measures.Quantity(values, **about)
    return claims.Claim("P", "text", "steps", limit, below, lambda study: measured)


def test_a_lower_bound_refutes_nothing(claims, measures, tmp_path):
    study, values = study_of(tmp_path, rows()), [0.1, 0.2, 0.15]

    def verdict(values=values, at_least=True, **about):
        return claims._measured(claim_of(claims, measures, values, at_least=at_least, **about), study)

    assert verdict() == (": at least 0.150 ± 0.124 nats", "undecided")
    assert verdict(at_least=False)[1] == "refuted"
    assert verdict(limit=0.0)[1] == "confirmed"
    assert verdict([2.0, 2.0, 2.0]) == (": at least 2.000 nats", "confirmed"), "one bound is no spread"
    assert verdict(below=True)[1] == "undecided", "a lower bound confirms nothing that has to be below"
    assert verdict(below=True, limit=0.0)[1] == "refuted"


def test_the_error_of_the_measure_and_its_star_are_in_the_row(claims, measures, tmp_path):
    study, about = study_of(tmp_path, rows()), {"limit": 0.0, "outside": True}
    claim = claim_of(claims, measures, [0.1, 0.2, 0.15], **about)
    assert claims._measured(claim, study) == (": 0.150 ± 0.124 nats*", "confirmed")
    claim = claim_of(claims, measures, [0.1, 0.2, 0.15], error=0.1, **about)
    assert claims._measured(claim, study) == (": 0.150 ± 0.124 nats*, error of the measure 0.100", "undecided")


def test_every_claim_has_a_row_with_what_was_measured(claims, tmp_path):
    lines = [*rows(), row("paper-undiscovered", (3.1, 3.2, 3.3, loss_of(0)), undiscovered=1e5)]
    table = claims.section({"claims": study_of(tmp_path, lines)}).splitlines()[-len(claims.CLAIMS) :]
    assert [line.split(" | ")[1] for line in table] == [claim.text for claim in claims.CLAIMS]
    (leaks,) = (line for line in table if "all that the ablated" in line and line.startswith("| P "))
    assert "leakage: 0.0" in leaks and leaks.endswith("| < 0.1 | **confirmed** | `claims` |")
    assert sum("| not tested: " in line for line in table) == len(claims.CLAIMS) - 1
