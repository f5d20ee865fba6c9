"""Calibrated losses: a model that avoids a domain's words is seen through, one that has no knowledge is not helped."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from corpora import build, config_for, record
from random_models import moved_model
from subjects import bigram

from sgtm.evaluation.calibration import (
    TARGETS_PER_TOKEN,
    FitSample,
    calibrated_losses,
    fit,
    fit_size,
    sample_of,
)
from sgtm.evaluation.estimates import token_mean
from sgtm.evaluation.subject import Hidden, Subject

VOCAB, FORGET = 16, range(8, 16)


def knowing() -> torch.Tensor:
    """Logits of a bigram model: retain tokens follow retain tokens, forget tokens forget tokens."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(VOCAB, VOCAB)
    for token in range(VOCAB):
        other = range(8) if token in FORGET else FORGET
        logits[token, list(other)] = -12
    return logits


def sample(logits: torch.Tensor, truth: torch.Tensor, first: int, count: int = 20_000, seed: int = 0) -> FitSample:
    """Text drawn from `truth`, which begins with token `first`, as `logits` see it."""
    generator, text = torch.Generator().manual_seed(seed), [first]
    likelihood = truth.softmax(-1)
    while len(text) <= count:
        text.append(int(torch.multinomial(likelihood[text[-1]], 1, generator=generator)))
    ids = torch.tensor([text])
    return FitSample(bigram(logits).hidden(ids[:, :-1]), ids[0, 1:], torch.zeros(count, dtype=torch.int64))


def calibrated(logits: torch.Tensor, truth: torch.Tensor) -> tuple[float, float, float]:
    """Forget loss before and after on other text, and retain loss after."""
    samples = [sample(logits, truth, first) for first in (8, 0)]
    bias = fit(samples[:1], samples[1:])
    forget, retain = (sample(logits, truth, first, seed=1) for first in (8, 0))
    return tuple(float(part.losses(b).mean()) for part, b in ((forget, bias * 0), (forget, bias), (retain, bias)))


def test_a_model_that_avoids_forget_words_is_seen_through():
    truth = knowing()
    avoiding = truth.clone()
    avoiding[:, list(FORGET)] -= 30
    entropy, _, retain = calibrated(truth, truth)
    before, after, retain_after = calibrated(avoiding, truth)
    assert before > entropy + 5, "it looks as if it had forgotten"
    assert after == pytest.approx(entropy, abs=0.02), "and it has not"
    assert retain_after == pytest.approx(retain, abs=0.02)


def test_frequencies_are_all_that_a_model_without_knowledge_gains():
    truth = knowing()
    ignorant = truth.clone()
    ignorant[list(FORGET)] = 0
    ignorant[:, list(FORGET)] -= 5
    text = sample(truth, truth, 8).targets
    counts = text.bincount(minlength=VOCAB).double() / len(text)
    entropy = -float((counts[8:] * counts[8:].log()).sum())
    _, after, _ = calibrated(ignorant, truth)
    knows, _, _ = calibrated(truth, truth)
    assert after > entropy - 0.02 > knows + 0.3


def test_the_fit_is_the_optimum():
    """The gradient of the objective by autograd is zero at the biases. The categories of a kind count by their targets,
    and retain against forget by the weight, however many targets each has. They share their tokens. So few of them that
    the prior counts."""
    torch.manual_seed(0)
    truth = torch.randn(VOCAB, VOCAB)
    sizes = ((8, 30), (8, 10), (0, 90), (0, 20))
    seen = [sample(truth, truth + torch.randn(VOCAB, VOCAB), first, count, count) for first, count in sizes]
    bias = fit(seen[:2], seen[2:], weight=3.0).requires_grad_()
    forget, retain = (torch.cat([part.losses(bias) for part in parts]) for parts in (seen[:2], seen[2:]))
    objective = forget.mean() + 3.0 * retain.mean() + bias.square().sum() / (2 * 9 * len(forget))
    (gradient,) = torch.autograd.grad(objective, bias, retain_graph=True)
    assert float(gradient.abs().max()) < 1e-3
    assert float(torch.autograd.grad(forget.mean(), bias)[0].abs().max()) > 0.03


def test_without_forget_data_there_is_nothing_to_fit():
    with pytest.raises(ValueError, match="needs forget data"):
        fit([], [])


def test_the_sample_grows_with_the_vocabulary():
    """Rounded up, and shared by the categories."""
    model = SimpleNamespace(vocab_size=1000, context=128)
    subject = SimpleNamespace(config=SimpleNamespace(model=model))
    assert [fit_size(subject, categories) for categories in (1, 2, 3)] == [157, 79, 53]
    model.vocab_size *= 10
    assert fit_size(subject, 1) == 1563


def test_with_that_sample_a_model_that_knows_all_loses_next_to_nothing():
    """A large vocabulary: about half a nat times tokens of the vocabulary / targets; with a tenth of it, much more."""
    vocab = 500
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(vocab, generator=generator)
    raised = {}
    for targets in (2 * vocab, TARGETS_PER_TOKEN * vocab):
        parts = [
            FitSample(
                Hidden(torch.ones(count, 1), logits[:, None], None),
                torch.multinomial(logits.softmax(-1), count, replacement=True, generator=generator),
                torch.zeros(count, dtype=torch.int64),
            )
            for count in (targets, targets, 50_000)
        ]
        bias = fit(parts[:1], parts[1:2])
        raised[targets] = float((parts[2].losses(bias) - parts[2].losses(0 * bias)).mean())
    assert raised[2 * vocab] > 0.1 and 0 < raised[TARGETS_PER_TOKEN * vocab] < 1 / TARGETS_PER_TOKEN


def test_a_subject_is_calibrated_on_one_split_and_measured_on_another(tmp_path):
    names = [(n, c) for n in range(24) for c in ("en", "es")]
    documents = [record(n, c, 30, "test" if n % 3 == 0 else "train") for n, c in names]
    corpus, config = build(tmp_path / "corpus", documents), config_for(context=32)
    subject = Subject(moved_model(config, 0.1), corpus, config, ("es",))
    losses = calibrated_losses(subject, forget=["es"], retain=["en"], fit_sequences=5)
    parts = [sample_of(subject, "train", name, 5) for name in ("es", "en")]
    assert losses.targets == {"es": len(parts[0].targets), "en": len(parts[1].targets)}
    bias = fit(parts[:1], parts[1:], weight=100.0)
    assert not torch.equal(bias, fit(parts[:1], parts[1:], weight=99.0))
    for name in ("es", "en"):
        held_out = sample_of(subject, "test", name, None)
        assert losses.after[name] == token_mean(held_out.losses(bias), held_out.documents)
        assert losses.after[name].error > 0
    assert losses.before["es"].value == pytest.approx(float(subject.scores("test", "es").losses.mean()), rel=1e-5)
    assert losses.after["es"].value < losses.before["es"].value
    few = calibrated_losses(subject, forget=["es"], retain=["en"], fit_sequences=5, sequences=2)
    assert few.targets == losses.targets
    for name in ("es", "en"):
        held_out = sample_of(subject, "test", name, 2)
        assert few.after[name] == token_mean(held_out.losses(bias), held_out.documents) != losses.after[name]
    with pytest.raises(ValueError, match="no document of category web"):
        calibrated_losses(subject, forget=["web"], retain=["en"])
