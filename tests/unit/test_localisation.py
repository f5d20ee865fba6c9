"""Gradient norms by true label and group, against autograd by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from corpora import build, config_for, record
from random_models import moved_model

from sgtm.data.batch import IGNORE
from sgtm.data.loader import evaluation_batches
from sgtm.evaluation.localisation import gradient_norms
from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Transformer

CPU = torch.device("cpu")


LABELS = {"en": "retain", "de": "retain", "es": "forget:es"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    records = [
        record(n + 5 * (split == "test"), category, 20 + 5 * n, split)
        for n in range(5)
        for category in LABELS
        for split in ("train", "test")
    ]
    config = config_for()
    return config, build(tmp_path_factory.mktemp("localisation") / "corpus", records, LABELS), moved_model(config, 0.2)


def test_gradient_norms_of_each_label_and_group(setting):
    config, corpus, model = setting
    norms = gradient_norms(model, corpus, config, split="test", sequences=4, device=CPU)
    assert set(norms) == {"retain", "forget:es"} and all(set(row) == {"retain", "es"} for row in norms.values())
    assert all(value > 0 for row in norms.values() for value in row.values())
    assert norms["retain"] != norms["forget:es"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_norms_are_those_of_the_mean_loss_over_all_categories_of_a_label(setting):
    config, corpus, model = setting
    norms = gradient_norms(model, corpus, config, split="test", sequences=100, device=CPU)

    other = Transformer(config.model, config.partition, "reference")
    other.load_state_dict(model.state_dict())
    tables = build_tables(config.space, "none")
    for label, categories in {"retain": ["en", "de"], "forget:es": ["es"]}.items():
        total, count = 0.0, 0
        for category in categories:
            for batch in evaluation_batches(corpus, config, "test", category):
                logits, targets = other.logits(batch.input_ids, batch.plan(tables)), batch.targets.flatten()
                total = total + F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
                count += int((targets != IGNORE).sum())
        other.zero_grad()
        (total / count).backward()
        for group in ("retain", "es"):
            gradients, weights = [], []
            for name, parameter in other.named_parameters():
                rows = other.parameter_rows()[name]
                for key, start, end in zip(rows.keys, rows.bounds[:-1], rows.bounds[1:], strict=True):
                    if key.endswith(f".{group}"):
                        gradients.append(parameter.grad[start:end].flatten())
                        weights.append(parameter[start:end].detach().flatten())
            expected = float(torch.cat(gradients).norm() / torch.cat(weights).norm())
            assert norms[label][group] == pytest.approx(expected, rel=1e-4)


def test_the_gradients_are_of_the_split_and_of_so_many_sequences(setting):
    config, corpus, model = setting
    sizes = ((split, sequences) for split in ("train", "test") for sequences in (1, 2, 100))
    norms = [
        gradient_norms(model, corpus, config, split=s, sequences=n, device=CPU)["forget:es"]["es"] for s, n in sizes
    ]
    assert len({round(norm, 6) for norm in norms}) == len(norms)
