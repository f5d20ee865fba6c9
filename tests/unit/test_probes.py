"""Probes of hidden states that hold the next token, unread by the head, and of hidden states that do not hold it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.config.schema import Config
from sgtm.evaluation.estimates import token_mean
from sgtm.evaluation.probes import Head, Layer, layers_of, probe, probes
from sgtm.evaluation.subject import Subject

VOCAB, WIDTH, TARGETS = 12, 16, 4000


def layer(knows: bool, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(VOCAB, (TARGETS,), generator=generator)
    basis = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(7))
    x = basis[targets] if knows else basis[targets[torch.randperm(TARGETS, generator=generator)]]
    documents = torch.arange(TARGETS) // 10
    return Layer(3 * x + 0.1 * torch.randn(x.shape, generator=generator), targets, documents)


def test_knowledge_that_the_head_does_not_read_is_read_out():
    head = Head(torch.zeros(VOCAB, WIDTH))
    result = probe(layer(True, 0), layer(True, 1), head)
    assert result.own_head.value == pytest.approx(math.log(VOCAB), rel=1e-5)
    assert result.fitted.value < 0.1


def test_the_error_is_that_of_documents():
    held_out, head = layer(True, 1), Head(torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(2)))
    losses = F.cross_entropy(F.linear(held_out.x, head.weight), held_out.targets, reduction="none")
    expected, single = (token_mean(losses, owners).error for owners in (held_out.documents, torch.arange(TARGETS)))
    assert probe(layer(True, 0), held_out, head).own_head.error == pytest.approx(expected, rel=1e-5) != single


def test_nothing_is_read_out_of_states_without_knowledge():
    states = layer(False, 0)
    few = Layer(*(part[:200] for part in states))  # which a probe learns by heart
    for fitted_on in (states, few):
        result = probe(fitted_on, layer(False, 1), Head(torch.zeros(VOCAB, WIDTH)))
        assert result.fitted.value > math.log(VOCAB) - 0.02


def test_a_probe_is_the_same_every_time():
    parts = layer(True, 0), layer(True, 1), Head(torch.zeros(VOCAB, WIDTH))
    assert probe(*parts) == probe(*parts)


def test_the_rate_is_chosen_on_what_the_head_was_not_fitted_on(monkeypatch):
    """The high rate learns a few states by heart: it is the best on these, and the worst on any others."""
    monkeypatch.setattr("sgtm.evaluation.probes.RATES", (1e-6, 0.1))
    few = Layer(*(part[:200] for part in layer(False, 0)))
    result = probe(few, layer(False, 1), Head(torch.zeros(VOCAB, WIDTH)))
    assert (result.rate, result.fitted.value) == (1e-6, pytest.approx(math.log(VOCAB), abs=1e-3))
    assert result.chosen == pytest.approx(result.fitted.value, abs=1e-3)


def test_the_bias_of_a_head_is_fitted_too():
    """States that hold nothing, and tokens that are not equally frequent."""
    states = [
        Layer(torch.zeros(TARGETS, WIDTH), layer(True, seed).targets.clamp(max=1), layer(True, seed).documents)
        for seed in (0, 1)
    ]
    frequent = torch.tensor([1 / VOCAB, 1 - 1 / VOCAB])
    entropy = -float((frequent * frequent.log()).sum())
    without, with_bias = (probe(*states, Head(torch.zeros(VOCAB, WIDTH), bias)) for bias in (None, torch.zeros(VOCAB)))
    assert without.fitted.value == pytest.approx(math.log(VOCAB)) and with_bias.own_head == without.own_head
    assert entropy < with_bias.fitted.value < math.log(VOCAB) - 0.4


@pytest.fixture
def subject(tmp_path) -> Subject:
    documents = [record(n, "es", 30, "test" if n % 3 == 0 else "train") for n in range(24)]
    corpus, config = build(tmp_path / "corpus", documents), config_for(context=32)
    values = config.model_dump(exclude_unset=True)
    model = {**values["model"], "layers": 2, "family": "gpt_neo", "head_bias": True}
    config = Config.model_validate({**values, "model": model})
    return Subject(moved_model(config, 0.1), corpus, config, ("es",))


def test_the_last_layer_is_what_the_head_reads(subject):
    layers, head = layers_of(subject, "test", "es", None)
    scores = subject.scores("test", "es")
    logits = torch.nn.functional.linear(layers[-1].x, *head)
    losses = torch.nn.functional.cross_entropy(logits, layers[-1].targets, reduction="none")
    assert torch.allclose(losses, scores.losses, atol=1e-4) and len(layers) == 2
    assert not torch.allclose(layers[0].x, layers[1].x)
    assert not subject.model.blocks[0]._forward_hooks


def test_probes_of_a_run(subject):
    by_layer = probes(subject, "es")
    assert list(by_layer) == [0, 1] and all(one.fitted.value < one.own_head.value for one in by_layer.values())
    assert by_layer[0].own_head != by_layer[1].own_head
    with pytest.raises(ValueError, match="no layer 2: the model has 2"):
        probes(subject, "es", layers=[2])
