"""The grid of post-hoc unlearning: which setting is chosen, and what its row has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture
def unlearning(benchmarks):
    import unlearning

    return unlearning


def setting(retain: float, forget: float) -> dict:
    return {"retain": retain, "forget": forget, "retain_before": 4.0, "forget_before": 4.2}


def test_the_choice_forgets_most_of_those_that_keep_the_retain_loss(unlearning):
    rows = [setting(4.05, 5.0), setting(4.2, 9.0), setting(4.09, 6.0), setting(3.9, 5.5)]
    assert unlearning.choice(rows) is rows[2]
    assert unlearning.choice([setting(4.2, 9.0)]) is None


def test_four_losses_are_means_over_categories(unlearning):
    labels = {"en": "retain", "web": "unlabeled", "es": "forget:es"}
    full, without = {"en": 1.0, "web": 2.0, "es": 3.0}, {"en": 2.0, "web": 4.0, "es": 9.0}
    assert unlearning.four_losses({"full": full}, labels) == {"full_retain": 1.5, "full_forget": 3.0}
    assert unlearning.four_losses({"full": full, "without es": without}, labels) == {
        "full_retain": 1.5, "full_forget": 3.0, "ablated_retain": 3.0, "ablated_forget": 9.0,
    }  # fmt: skip


def test_a_row_is_one_that_the_documents_take(unlearning, benchmarks):
    import experiments

    train = SimpleNamespace(steps=10, tokens_per_step=100)
    runs = [SimpleNamespace(variant="unmasked", config=SimpleNamespace(train=train))] * 2
    seeds = [{"seed": n, "full_retain": 4.0 + n, "full_forget": 6.0 + n} for n in range(2)]
    row = unlearning.variant_row(runs, "rmu", seeds, masks=False)
    assert (row["full_retain"], row["ablated_forget"], row["tokens"]) == (4.5, None, 1000)
    text = experiments.tables([row])
    assert "| unmasked + rmu | 2 | 1,000 | 4.500 ± 0.707 | 6.500 ± 0.707 |  |  |" in text


def test_a_grid_is_shown_with_its_choice(benchmarks):
    import experiments

    best = {"method": "rmu", "options": {"alpha": 10.0}, "factor": 3.0, **setting(4.09, 6.0), "chosen": True}
    text = experiments.settings([best, {**best, "factor": 1.0, "chosen": False}])
    assert "before: 4.000 and 4.200" in text and "| rmu | alpha 10 | 3 | 4.090 | 6.000 | yes |" in text
    assert "| rmu | alpha 10 | 1 | 4.090 | 6.000 |  |" in text and experiments.settings([{"variant": "a"}]) == ""
