"""Modules of Hugging Face with masks: sgtm/integrations/modules.py."""

from __future__ import annotations

import pytest
import torch
from hf_models import CONFIGS, MIXED, by_key, gradients_of, masked_model, plain_model, random_ids

from sgtm.integrations.hf import apply_sgtm
from sgtm.integrations.modules import MaskedEmbedding, MaskedLinear

MASKED = {"domains": ["bio", "code"], "forget_heads": 2, "forget_neurons": 1, "joint": "masked"}


@pytest.mark.parametrize("family", CONFIGS)
def test_classes_keep_their_names_and_are_subclasses(family):
    plain, model = plain_model(family), masked_model(family)
    for (name, theirs), (_, ours) in zip(plain.named_modules(), model.named_modules(), strict=True):
        assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__, name
    assert repr(model) == repr(plain)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo"])
def test_positions_that_sequences_share_learn_from_each_by_its_label(family):
    """Hugging Face looks them up once for the whole batch."""
    model = masked_model(family, joint=["position"])
    ids = random_ids()
    mixed = gradients_of(model, ids, MIXED)["transformer.wpe.weight"]
    other = ids.clone()
    other[0] = random_ids(seed=1)[0]  # a forget sequence
    assert mixed.any() and torch.equal(gradients_of(model, other, MIXED)["transformer.wpe.weight"], mixed)
    assert not gradients_of(model, ids, ["forget:bio"] * 5)["transformer.wpe.weight"].any()


def test_a_padding_row_learns_nothing():
    plain, model = plain_model("llama", pad_token_id=3), apply_sgtm(plain_model("llama", pad_token_id=3), MASKED)
    ids = random_ids()
    ids[:, 4] = 3
    plain(input_ids=ids, labels=ids).loss.backward()
    gradient = gradients_of(model, ids, ["unlabeled"] * 5)["model.embed_tokens.weight"]
    expected = plain.model.embed_tokens.weight.grad
    assert not expected[3].any() and not gradient[3].any()
    assert torch.allclose(gradient, expected, atol=1e-7)


@pytest.mark.parametrize("family", CONFIGS)
def test_in_bf16_the_logits_are_the_plain_ones(family):
    plain, model = plain_model(family).bfloat16(), masked_model(family).bfloat16()
    ids = random_ids()
    logits = model(input_ids=ids, sgtm_labels=["unlabeled"] * 5).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, plain(input_ids=ids).logits)
    pieces = by_key(model, gradients_of(model, ids, ["retain"] * 5))
    assert not any(piece.any() for key, piece in pieces.items() if key[0].endswith((".bio", ".code")))


@pytest.mark.parametrize("family", CONFIGS)
def test_under_autocast_the_logits_are_the_plain_ones(family):
    plain, model = plain_model(family), masked_model(family)
    ids = random_ids()
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(input_ids=ids, labels=ids, sgtm_labels=["unlabeled"] * 5)
        theirs = plain(input_ids=ids, labels=ids)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for (name, mine), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - other.grad).abs().max() <= 0.03 * other.grad.abs().max() + 1e-3, name


def test_the_ends_are_masked():
    model = masked_model("gpt_neox")
    assert isinstance(model.get_input_embeddings(), MaskedEmbedding)
    assert isinstance(model.get_output_embeddings(), MaskedLinear)
