"""Evaluation against cross-entropy by hand: each set of removed domains, every category, one rank and two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.config import load_config
from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.data.open import open_corpus
from sgtm.evaluation.losses import evaluate, standard_error
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = load_config("debug", [f"--runs={tmp_path_factory.mktemp('runs')}"])
    return config, open_corpus(config), moved_model(config, 0.2)


def measure(setting, split: str = "test", **share):
    config, corpus, model = setting
    return evaluate(model, corpus, config, split=split, sequences=6, device=CPU, **share).losses


def by_hand(setting, category: str, without_es: bool, split: str = "test") -> float:
    """Mean cross-entropy with the group's rows set to zero, which is what removing it means."""
    config, corpus, model = setting
    edited = Transformer(config.model, config.partition, "reference")
    edited.load_state_dict(model.state_dict())
    if without_es:
        rows = edited.parameter_rows()
        with torch.no_grad():
            for name, parameter in edited.named_parameters():
                for start, end, key in rows[name].segments(1):
                    if key in ("attn_out.es", "mlp_out.es"):
                        parameter[start:end] = 0
    total = count = 0.0
    for batch in evaluation_batches(corpus, config, split, category, max_sequences=6):
        logits = edited.logits(batch.input_ids, batch.plan(config.tables)).flatten(0, 1)
        total += float(F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE, reduction="sum").detach())
        count += int((batch.targets != IGNORE).sum())
    return total / count


@pytest.mark.parametrize("category", ["en", "es"])
@pytest.mark.parametrize("split", ["test", "train"])
def test_losses_are_those_of_the_edited_model(setting, category: str, split: str):
    losses = measure(setting, split)
    assert set(losses) == {"full", "without es"} and set(losses["full"]) == {"en", "es"}
    without = by_hand(setting, category, True, split)
    assert losses["without es"][category] == pytest.approx(without, rel=1e-5)
    if category == "es":  # English runs here under its label retain, whose tokens see no forget group at all
        full = by_hand(setting, category, False, split)
        assert losses["full"][category] == pytest.approx(full, rel=1e-5)
        assert abs(full - without) > 1e-3, "the group must matter for the comparison to mean anything"


def test_nothing_is_removed_from_a_model_that_was_trained_without_masks(setting):
    config, corpus, model = setting
    unmasked = ["--masking.strategy=none", f"--runs={config.runs}"]
    losses = measure((load_config("debug", unmasked), corpus, model))
    assert set(losses) == {"full"} and losses["full"] == measure(setting)["full"]
    for masked in ("--train.init_from=folder", "--masking.overrides={update.forget:es.retain.mlp_in: 0.5}"):
        assert load_config("debug", [*unmasked, masked]).removals == [(), ("es",)]


def test_a_domain_at_a_strength_is_a_condition_of_its_own(setting):
    """At 1 it is the full model and at 0 the ablated one, bit for bit; twice the same is one condition."""
    plain = measure(setting)
    losses = measure(setting, strengths=[{"es": 1.0}, {"es": 0.5}, {"es": 0.0}, {"es": 0.5}])
    assert list(losses) == ["full", "without es", "with es at 1", "with es at 0.5", "with es at 0"]
    assert {name: losses[name] for name in plain} == plain
    assert losses["with es at 1"] == losses["full"] and losses["with es at 0"] == losses["without es"]
    assert losses["with es at 0.5"] not in (losses["full"], losses["without es"])


def test_a_check_may_end_an_evaluation_before_any_batch(setting):
    batches = []

    def check() -> None:
        batches.append(len(batches))
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(setting, check=check)
    assert batches == [0, 1, 2]


def test_ranks_share_the_sequences(setting):
    shares = {rank: [] for rank in (0, 1)}
    for rank in shares:
        measure(setting, rank=rank, world_size=2, all_reduce_sum=lambda sums, r=rank: shares[r].append(sums) or sums)
    merged = iter([a + b for a, b in zip(shares[0], shares[1], strict=True)])
    together = measure(setting, rank=0, world_size=2, all_reduce_sum=lambda sums: next(merged))
    alone = measure(setting)
    for name in alone:
        assert together[name] == pytest.approx(alone[name], rel=1e-6)


def test_norms_by_removal_and_category_whatever_the_ranks(setting):
    config, corpus, model = setting
    options = {"split": "test", "sequences": 6, "device": CPU}
    losses, norms, sample = evaluate(model, corpus, config, **options)
    assert losses == measure(setting)
    shares = {rank: [] for rank in (0, 1)}
    for rank, mine in shares.items():
        share = {"rank": rank, "world_size": 2, "all_reduce_sum": lambda sums, mine=mine: mine.append(sums) or sums}
        evaluate(model, corpus, config, **options, **share)
    merged = iter([a + b for a, b in zip(*shares.values(), strict=True)])
    share = {"rank": 0, "world_size": 2, "all_reduce_sum": lambda sums: next(merged)}
    _, together, their_sample = evaluate(model, corpus, config, **options, **share)
    assert their_sample.keys() == sample.keys() and their_sample["measured"] == sample["measured"]
    for key in ("errors", "difference_errors"):
        for removal, by_category in sample[key].items():
            assert their_sample[key][removal] == pytest.approx(by_category, rel=1e-3)
    assert norms.keys() == together.keys() == {"full", "without es"}
    for removal, sources in (("full", {"residual", "attention", "mlp"}), ("without es", {"residual"})):
        assert norms[removal].keys() == {"en", "es"}
        for category, parts in norms[removal].items():
            assert parts.keys() == sources
            assert removal != "full" or parts["attention"].keys() == parts["mlp"].keys() == {"retain", "es"}
            assert together[removal][category]["residual"] == pytest.approx(parts["residual"], rel=1e-4)
    assert norms["full"]["en"]["residual"][1:] != norms["without es"]["en"]["residual"][1:]
    assert norms["full"]["en"]["residual"][0] == norms["without es"]["en"]["residual"][0]


def losses_by_document(model, corpus, config, category: str, removed: tuple[str, ...]) -> list[list[float]]:
    """Token losses of each document of split test that has any: a document ends where the target is EOS."""
    tables, documents = removal_tables(config.space, removed), [[]]
    for batch in evaluation_batches(corpus, config, "test", category):
        targets = batch.targets.flatten()
        logits = model.logits(batch.input_ids, batch.plan(tables)).flatten(0, 1)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").detach()
        for target, loss in zip(targets.tolist(), losses.tolist(), strict=True):
            if target != IGNORE:
                documents[-1].append(loss)
            if target == corpus.eos_id:
                documents.append([])
    return [document for document in documents if document]


@pytest.mark.parametrize("isolated", [False, True])
def test_errors_are_those_of_a_ratio_of_sums_over_documents(tmp_path, isolated: bool):
    lengths = {"en": (20, 45, 9, 33, 12, 60), "es": (30, 9, 25), "web": (50,)}
    records = [record(n, category, size, "test") for category, of in lengths.items() for n, size in enumerate(of)]
    records += [record(n, category) for category in lengths for n in range(9, 12)]
    corpus, config = build(tmp_path / "corpus", records), config_for(isolate_documents=isolated)
    model = moved_model(config, 0.3)
    sample = evaluate(model, corpus, config, split="test", sequences=None, device=CPU).sample
    assert sample["true_labels"] == corpus.categories
    for category, sizes in lengths.items():
        tokens = sum(sizes) if isolated else sum(sizes) + len(sizes) - 1  # the first token of the stream is no target
        assert sample["measured"][category] == {"documents": len(sizes), "tokens": tokens}
        both = [losses_by_document(model, corpus, config, category, removed) for removed in ((), ("es",))]
        full, without = (np.array([sum(document) for document in documents]) for documents in both)
        counts = np.array([len(document) for document in both[0]])
        for by_category, sums in (
            (sample["errors"]["full"], full),
            (sample["errors"]["without es"], without),
            (sample["difference_errors"]["without es"], without - full),
        ):
            missed = sums - counts * sums.sum() / counts.sum()
            if len(sizes) == 1:
                assert category not in by_category
            else:
                error = np.sqrt(len(sizes) / (len(sizes) - 1) * (missed**2).sum()) / counts.sum()
                assert by_category[category] == pytest.approx(error, rel=1e-3) and error > 1e-4


def test_an_error_is_the_spread_of_means_over_other_documents():
    """The mean of many samples of 40 documents of all sizes has the standard deviation that each sample promises."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 200, (500, 40), generator=generator).double()
    sums = counts * (3 + torch.randn(500, 40, generator=generator).double())
    promised = torch.tensor([standard_error(s, n) for s, n in zip(sums, counts, strict=True)])
    assert float((sums.sum(1) / counts.sum(1)).std()) == pytest.approx(float(promised.mean()), rel=0.08)
