"""benchmarks/trainer.py: every run reads the same English, and a row has the losses of its seeds."""

import pytest
from corpora import LABELS, build, record


@pytest.fixture
def script(benchmarks, monkeypatch):
    import trainer

    monkeypatch.setattr(trainer, "CONTEXT", 8)
    monkeypatch.setattr(trainer, "BATCH", 4)
    return trainer


def corpus(folder, length):
    return build(folder, [record(0, category, length, "train") for category in LABELS], LABELS)


def test_the_same_english_and_a_fifth_of_it_as_spanish(script, tmp_path):
    small = corpus(tmp_path, 8 * 30)
    masked, filtered = (
        script.mixture(small, 10, script.batch_of(variant)).to_dict() for variant in ("masked", "filtered")
    )
    assert masked["input_ids"][:30] == filtered["input_ids"] and len(masked["input_ids"]) == 10 * 4
    english = script.sequences(small, "train", "en", 30)
    assert filtered["input_ids"] == filtered["labels"] == english and small.tokenizer.decode(english[0]) == "en000000"
    assert masked["input_ids"][30:] == script.sequences(small, "train", "es", 10)
    assert masked["sgtm_labels"][:6] == ["retain"] * 4 + ["forget:es", "retain"]
    assert masked["sgtm_labels"].count("retain") == 24 and set(masked["sgtm_labels"][30:]) == {"forget:es"}


def test_a_corpus_that_is_too_small_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match="split train has 5 sequences of en; 30 are needed"):
        script.mixture(corpus(tmp_path, 8 * 5), 10, 4)


def test_a_row_has_the_losses_of_its_seeds(script):
    seeds = [{"seed": seed, "full_retain": 2.0 + seed, "full_forget": 3.0} for seed in (0, 2)]
    row = script.row("filtered", seeds, 10)
    assert (row["full_retain"], row["full_retain_sd"], row["full_forget_sd"]) == (3.0, pytest.approx(2**0.5), 0.0)
    assert row["ablated_retain"] is row["ablated_forget_sd"] is None and not row["masks"]
    assert row["tokens"] == 10 * 3 * 8 and row["finished"] == 2 and row["seeds"] == seeds
    ablated = [{**seed, "ablated_retain": 4.0, "ablated_forget": 9.0} for seed in seeds]
    assert script.row("masked", ablated, 10)["ablated_forget"] == 9.0 and script.row("masked", ablated, 10)["masks"]
