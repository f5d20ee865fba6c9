"""What removals do where there are too many to list: means by true label, a sentence for all domains, bounded names."""

from __future__ import annotations

import math

import pytest
from many_domains import names, summary, tokens

from sgtm.evaluation.effects import by_true_label, described, effects, short_name


def test_losses_of_a_true_label_are_means_over_tokens():
    true = {"en": "retain", "fr": "retain", "d1": "forget:d1"}
    means = by_true_label({"en": 1.0, "fr": 3.0, "d1": 5.0}, true, {"en": 300, "fr": 100, "d1": 7})
    assert means == {"retain": pytest.approx(1.5), "forget:d1": 5.0}
    assert by_true_label({"en": 1.0, "fr": 3.0}, true, {}) == {"retain": 2.0}
    assert math.isnan(by_true_label({"en": None, "fr": 3.0}, true, {})["retain"])


def test_effects_are_changes_of_own_other_and_retained_data():
    of = summary(4, ("d1", "d3"))
    changes = effects(of["losses"], of["true_labels"], tokens(of))
    assert list(changes) == [
        "without d1",
        "without d2",
        "without d3",
        "without d4",
        "without d1,d3",
        "without d1,d2,d3,d4",
    ]
    alone, pair = changes["without d2"], changes["without d1,d3"]
    assert alone.own == {"d2": pytest.approx(0.2)} and alone.retained == {"retain": pytest.approx(0.0075)}
    assert alone.others == {name: pytest.approx(0.02) for name in ("d1", "d3", "d4")}
    assert pair.own == {"d1": pytest.approx(0.1), "d3": pytest.approx(0.3)} and set(pair.others) == {"d2", "d4"}
    assert changes["without d1,d2,d3,d4"].others == {}


def test_a_domain_at_a_strength_is_the_conditions_own():
    losses = {"full": {"d1": 2.0, "d2": 2.0}, "with d1 at 0.5": {"d1": 3.0, "d2": 2.5}}
    changes = effects(losses, {"d1": "forget:d1", "d2": "forget:d2"}, {})
    assert (changes["with d1 at 0.5"].own, changes["with d1 at 0.5"].others) == ({"d1": 1.0}, {"d2": 0.5})


@pytest.mark.parametrize("count", [4, 20, 50])
def test_the_sentences_do_not_grow_with_the_domains(count):
    of = summary(count)
    each, every = described(of["losses"], of["true_labels"], tokens(of))
    mean, last = sum(range(1, count + 1)) / count / 10, f"+{count / 10:.2f} on d{count}"
    assert each == (
        f"Removing one of {count} domains changes the loss on its own data by {mean:+.2f} (+0.10 on d1 to {last}), on "
        f"other domains by +0.02, on retain data by +0.01, in nats per token."
    )
    assert every.startswith(f"Without all {count} domains: on the data of its domains by {mean:+.2f} (")


def test_a_chosen_set_has_a_sentence_and_a_loss_that_is_not_finite_is_told():
    of = summary(5, ("d1", "d2"))
    assert (
        "Without d1,d2: on the data of its domains by +0.15 (+0.10 on d1 to +0.20 on d2)"
        in described(of["losses"], of["true_labels"], tokens(of))[1]
    )
    of["losses"]["without d3"]["d3"] = None
    assert (
        "on its own data by an infinite or undefined amount on d3"
        in described(of["losses"], of["true_labels"], tokens(of))[0]
    )


def test_names_of_conditions_are_short():
    many = names(20)
    assert short_name("without d1,d2,d3", 20) == "without d1,d2,d3"
    assert short_name("without " + ",".join(many), 20) == "without all 20 domains"
    assert short_name("without " + ",".join(many[:7]), 20) == "without 7 domains (d1, d2, ...)"
    assert short_name("full", 20) == "full" and short_name("with d1 at 0.5", 20) == "with d1 at 0.5"
