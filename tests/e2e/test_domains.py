"""Three domains, each removed by itself; and twenty, whose evaluation grows with the sets and not with 2^20.

Every category has letters of its own, so that what a model has learned of one is no use in another.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from corpora import BYTES, build
from ranks import run_ranks

from sgtm.config.schema import Config
from sgtm.data.loader import evaluation_batches
from sgtm.data.open import open_corpus
from sgtm.evaluation.losses import evaluate
from sgtm.model.transformer import Transformer
from sgtm.run.metrics import read_metrics

CONTEXT = 32


def write_corpus(folder: Path, domains: list[str], documents: int) -> str:
    """`documents` for each domain and as many in `en` as for all domains; every fourth is of split test."""
    rng, records = random.Random(0), []
    for number, category in enumerate(["en", *domains]):
        letters = [chr(33 + 4 * number + i) for i in range(4)]
        words = ["".join(rng.choices(letters, k=3)) for _ in range(6)]
        for n in range(documents * (len(domains) if category == "en" else 1)):
            text = " ".join(rng.choice(words) for _ in range(12))
            records.append({"text": text, "category": category, "split": "train" if n % 4 else "test"})
    labels = {"en": "retain"} | {domain: f"forget:{domain}" for domain in domains}
    return str(build(folder, records, labels).path)


def config_of(folder: Path, domains: list[str], documents: int, **train) -> Config:
    """Half of the documents are trained with all groups running, so that these learn to live together."""
    shape = {"family": "llama", "layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 64}
    half = {label: {label: 0.5, "unlabeled": 0.5} for label in ("retain", *(f"forget:{name}" for name in domains))}
    steps = {"steps": 8, "tokens_per_step": 16 * CONTEXT, "micro_batch": 16, "precision": "fp32"}
    return Config.model_validate(
        {
            "runs": str(folder / "runs"),
            "model": shape | {"vocab_size": BYTES, "context": CONTEXT},
            "masking": {
                "domains": domains,
                "joint": "masked",
                "partition": "add",
                "forget_heads": 1,
                "forget_neurons": 16,
            },
            "data": {"path": write_corpus(folder / "corpus", domains, documents), "channel": half},
            "optimizer": {"lr": 5e-3, "warmup_steps": 4},
            "train": steps | train,
        }
    )


def train(config: Config) -> dict:
    from sgtm.training import loop

    (line,) = [line for line in read_metrics(loop.train(config) / "metrics.jsonl") if line["kind"] == "eval"]
    return line["losses"]


def test_a_domains_loss_rises_only_where_it_is_removed(tmp_path: Path):
    """In each of the eight sets of three domains: by 2.26 nats at least, and all other losses by 0.27 at most."""
    domains = ["bio", "chem", "es"]
    pairs = [["bio", "chem"], ["bio", "es"], ["chem", "es"]]
    config = config_of(tmp_path, domains, 60, steps=120, eval_sequences=20, eval_removed=pairs)
    (losses,) = run_ranks(train, 1, config)
    assert list(losses) == ["full", *(f"without {','.join(removed)}" for removed in config.removals[1:])]
    assert len(losses) == 8
    for name, by_category in losses.items():
        removed = name.removeprefix("without ").split(",")
        for category, loss in by_category.items():
            change = loss - losses["full"][category]
            assert change > 1.5 if category in removed else abs(change) < 0.5, f"{category} {name}: {change:+.2f}"


@pytest.mark.parametrize("count", [5, 20])
def test_the_forward_passes_of_an_evaluation_are_the_sets_times_the_batches(tmp_path: Path, count: int):
    """A set that is chosen, or a strength, costs one pass over the data, whatever the number of domains."""
    config = config_of(tmp_path, [f"d{i}" for i in range(count)], 8)
    corpus, model = open_corpus(config), Transformer(config.model, config.partition)
    passes = 0

    def forward(*args):
        nonlocal passes
        passes += 1
        return model(*args)

    def evaluated(config: Config, **options) -> int:
        nonlocal passes
        passes = 0
        losses = evaluate(
            forward, corpus, config, split="test", sequences=3, device=torch.device("cpu"), **options
        ).losses
        assert all(len(by_category) == count + 1 for by_category in losses.values())
        return len(losses)

    once = sum(
        len(list(evaluation_batches(corpus, config, "test", name, max_sequences=3))) for name in corpus.categories
    )
    assert once == count + 1  # three sequences are one batch
    assert evaluated(config) == count + 2 and passes == (count + 2) * once
    chosen = config.train.model_copy(update={"eval_removed": [["d0", "d1"], ["d2", "d3", "d4"], ["d1", "d0"]]})
    more = config.model_copy(update={"train": chosen})
    assert evaluated(more, strengths=[{"d0": 0.5}]) == count + 5 and passes == (count + 5) * once
