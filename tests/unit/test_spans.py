"""What a labelled span inside a document reaches, from the prepared corpus through the loader to the gradients.

Two corpora differ in the forget text alone, byte for byte as long. Under `span_policy: conservative` the retain group's
gradient keeps every bit where no text follows the document's last forget token. Where some does, it reads the forget
text, so only the losses of forget tokens are kept away from the retain group, not what they say. Under `position` they
are not: the loss of a forget token reaches the retain positions before it.
"""

import random
from dataclasses import replace

import pytest
import torch
from corpora import BYTES, build, record
from families import by_key, contribution, gradients

from sgtm.config.schema import Config
from sgtm.data.batch import IGNORE, Batch
from sgtm.data.loader import Loader
from sgtm.data.store import Corpus
from sgtm.model.transformer import Transformer

FORGET = 2
GROUPED = {f"{part}.retain" for part in ("attn_in", "attn_out", "mlp_in", "mlp_out")}


def config_of(policy: str) -> Config:
    return Config.model_validate(
        {
            "model": {
                "layers": 2,
                "hidden_size": 16,
                "heads": 4,
                "intermediate_size": 16,
                "vocab_size": BYTES,
                "context": 32,
                "init_std": 0.3,
            },
            "masking": {"domains": ["es"], "forget_neurons": 3, "span_policy": policy},
            "data": {"mixing": "token"},
            "train": {"tokens_per_step": 8 * 32, "micro_batch": 4},
        }
    )


def documents(forget_seed: int, tail: bool) -> list[dict]:
    """Documents of one label and documents with forget text inside; the seed says what the forget text is."""
    letters, forget = random.Random(0), random.Random(forget_seed)

    def text(rng: random.Random, low: int = 3, high: int = 15) -> str:
        return "".join(rng.choices("abcdefgh ", k=letters.randint(low, high)))

    records = [record(0, split="test")]
    for number in range(40):
        for category in ("en", "web"):
            records.append({"text": text(letters), "category": category, "split": "train"})
            pieces, spans = "", []
            for _ in range(number % 3 + 1):
                pieces += text(letters)
                spans.append([len(pieces), len(pieces := pieces + text(forget)), "es"])
            pieces += text(letters) if tail else ""
            records.append({"text": pieces, "category": category, "split": "train", "spans": spans})
        records.append({"text": text(forget), "category": "es", "split": "train"})
    return records


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[bool, list[Corpus]]:
    """Two corpora whose forget text differs, by whether other text follows it in its document."""
    folder = tmp_path_factory.mktemp("spans")

    def pair(tail: bool) -> list[Corpus]:
        return [build(folder / f"{tail}-{seed}", documents(seed, tail)) for seed in (1, 2)]

    return {tail: pair(tail) for tail in (False, True)}


def epoch(corpus: Corpus, policy: str) -> list[Batch]:
    loader = Loader(corpus, config_of(policy))
    return [batch for step in range(loader.order(0).blocks_per_epoch // 8) for batch in loader.step(step)]


def with_other_forget_targets(batch: Batch) -> Batch:
    """The batch in which forget tokens are asked to predict something else."""
    labels = torch.tensor(batch.labels).repeat_interleave(torch.tensor(batch.lengths)).view_as(batch.targets)
    other = torch.where((labels == FORGET) & (batch.targets != IGNORE), (batch.targets + 1) % BYTES, batch.targets)
    return replace(batch, targets=other)


def changed(policy: str, before: list[Batch], after: list[Batch]) -> set[str]:
    """Keys of the rows whose gradient has another bit anywhere."""
    config = config_of(policy)
    torch.manual_seed(0)
    model = Transformer(config.model, config.partition)
    assert [batch.lengths for batch in before] == [batch.lengths for batch in after]
    assert any(not torch.equal(a.targets, b.targets) for a, b in zip(before, after, strict=True))
    a, b = (by_key(model, gradients(model, batches, config.tables)) for batches in (before, after))
    return {key[0] for key in a if not torch.equal(a[key], b[key])}


def promised(policy: str) -> set[str]:
    """Keys of the rows that forget tokens may not update."""
    config = config_of(policy)
    rows = Transformer(config.model, config.partition).parameter_rows().values()
    keys = {key for row in rows for key in row.keys}
    return {key for key in keys if contribution(config.tables, key, FORGET) == 0}


def test_conservative_keeps_forget_text_from_the_retain_group(corpora):
    before, after = (epoch(corpus, "conservative") for corpus in corpora[False])
    changed_keys = changed("conservative", before, after)
    assert promised("conservative") >= GROUPED
    assert not changed_keys & promised("conservative")
    assert {"attn_in.es", "mlp_out.es", "embedding+head", "norm"} <= changed_keys


def test_conservative_keeps_forget_losses_from_the_retain_group_where_text_follows(corpora):
    before = epoch(corpora[True][0], "conservative")
    changed_keys = changed("conservative", before, [with_other_forget_targets(batch) for batch in before])
    assert not changed_keys & promised("conservative") and "mlp_out.es" in changed_keys


def test_what_follows_a_forget_span_reads_it(corpora):
    before, after = (epoch(corpus, "conservative") for corpus in corpora[True])
    assert changed("conservative", before, after) >= GROUPED


@pytest.mark.parametrize("tail", [False, True])
def test_position_leaks(corpora, tail):
    before, after = (epoch(corpus, "position") for corpus in corpora[tail])
    assert changed("position", before, after) >= GROUPED
    assert changed("position", before, [with_other_forget_targets(batch) for batch in before]) >= GROUPED
