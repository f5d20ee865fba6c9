"""Random tokens in place of a corpus: documents, and micro-batches of every mask that training has."""

import numpy as np
import pytest
import torch
from corpora import BYTES, config_for

from sgtm.data.random_data import DOCUMENTS, MOST_DOCUMENTS, RandomCorpus, label_pieces, random_batch
from sgtm_kernels.plan import MAX_SLICES


def test_retain_data_and_each_domain_have_as_many_documents():
    corpus = RandomCorpus(config_for(domains=("es", "fr")))
    assert corpus.categories == {"retain": "retain", "es": "forget:es", "fr": "forget:fr"}
    assert np.bincount(corpus.documents["category"]).tolist() == [DOCUMENTS] * 3
    assert len(np.unique(corpus.documents["id"])) == 3 * DOCUMENTS
    lengths = corpus.documents["length"]
    assert (lengths.min(), lengths.max()) == (250, 749)


def test_a_document_has_the_same_tokens_at_every_call_and_ends_with_its_eos():
    corpus = RandomCorpus(config_for())
    tokens = corpus.tokens(7)
    assert len(tokens) == corpus.documents["length"][7] and tokens[-1] == corpus.eos_id == 0
    assert tokens[:-1].min() > 0 and tokens.max() < BYTES and len(set(tokens.tolist())) > BYTES // 2
    assert (corpus.tokens(7, 3, 9) == tokens[3:9]).all() and (corpus.tokens(7, 3) == tokens[3:]).all()
    assert (corpus.tokens(8)[:9] != tokens[:9]).any()


def test_a_label_that_is_rarely_applied_has_more_documents():
    def count(share: float) -> int:
        channel = {"retain": {"retain": 1 - share, "unlabeled": share}}
        return len(RandomCorpus(config_for(channel=channel)).documents)

    assert (count(0.05), count(0.001)) == (2 * 20 * DOCUMENTS, 2 * MOST_DOCUMENTS)


def test_documents_are_longer_where_a_rare_label_would_fill_no_step():
    """The documents of a label that is applied to a hundredth have the tokens of four steps."""
    config = config_for(channel={"retain": {"retain": 0.99, "unlabeled": 0.01}}, context=2**16, sequences=8)
    lengths = RandomCorpus(config).documents["length"]
    mean = 4 * config.train.tokens_per_step // (MOST_DOCUMENTS // 100)
    assert (lengths.min(), lengths.max()) == (mean // 2, mean * 3 // 2 - 1)


def test_labels_meet_as_the_mixing_lets_them():
    alone = [(0,), (1,), (2,)]
    for mixing in ("step", "micro"):
        assert label_pieces(config_for(mixing=mixing), 3) == alone
    assert label_pieces(config_for(mixing="sequence", micro_batch=4), 3) == [*alone, (0, 1, 2, 0)]
    assert label_pieces(config_for(mixing="sequence", micro_batch=1), 3) == alone
    *pure, mixed = label_pieces(config_for(mixing="token", context=64), 3)
    assert pure == alone and mixed == (0, 1, 2) * (MAX_SLICES + 1) + (0,) * (len(mixed) % 3)
    assert len(label_pieces(config_for(mixing="token", context=4), 3)[-1]) == 2 * 4, "a token each at most"


@pytest.mark.parametrize("isolated", [False, True])
def test_a_micro_batch_is_cut_into_pieces_of_equal_length(isolated):
    config = config_for(context=16, micro_batch=2, isolate_documents=isolated)
    batch = random_batch(config, (2, 0, 1))
    assert batch.input_ids.shape == (2, 16) and torch.equal(batch.targets, batch.input_ids)
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < BYTES
    assert (batch.labels, batch.lengths) == ((2, 0, 1), (10, 11, 11))
    assert batch.documents == (((0, 10), (10, 16), (16, 21), (21, 32)) if isolated else None)
    assert (batch.step_targets, batch.step_labels) == (config.train.tokens_per_step, {0, 1, 2})


def test_the_tokens_of_a_micro_batch_follow_the_seed():
    one, again, other = (random_batch(config_for(), (0,), seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
