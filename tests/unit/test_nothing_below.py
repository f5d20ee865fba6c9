"""What a backward pass leaves out because nothing would read it: every gradient stays what it was, bit for bit."""

import pytest
import torch
from families import BIO, FAMILIES, MIXINGS, SPACE, UNLABELED, gradients, model_of, plan_of, random_step

from sgtm.masking.strategy import build_tables
from sgtm.model.transformer import Attention
from sgtm_kernels.attention import pytorch

BELOW = ("embedding", "position", "norm")
KINDS = ((), BELOW, *(tuple(kind for kind in BELOW if kind != left) for left in BELOW))

by_family = pytest.mark.parametrize("family", FAMILIES)


def tables(*masked: str, labels=tuple(f"forget:{domain}" for domain in SPACE.domains)):
    """Parameter masking in which tokens of these labels leave these kinds alone."""
    overrides = {f"update_joint.{label}.{kind}": 0 for label in labels for kind in masked}
    return build_tables(SPACE, "sgtm", overrides=overrides)


STRATEGIES = {" ".join(kinds) or "free": tables(*kinds) for kinds in KINDS}
STRATEGIES["masked for every label"] = tables(*BELOW, labels=SPACE.labels)


@by_family
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_keep_every_bit(family, mixing, strategy, monkeypatch):
    batches, masks = random_step(mixing, seed=1), STRATEGIES[strategy]
    for masked_layers in (None, [1]):
        model = model_of(family, masked_layers=masked_layers)
        less = gradients(model, batches, masks)
        with monkeypatch.context() as patch:
            patch.setattr(Attention, "_learns_below", lambda *_: True)
            everything = gradients(model, batches, masks)
        for name, gradient in everything.items():
            assert torch.equal(less[name], gradient), name


@pytest.mark.parametrize(
    ("label", "masked", "computed"),
    [
        (BIO, BELOW, [False, True, True, True]),
        (BIO, BELOW[1:], [True, True, True, True]),
        (UNLABELED, BELOW, [True] * 2),  # nothing is masked: all heads of a layer at once
    ],
)
def test_retain_heads_of_the_first_layer_have_no_backward(label, masked, computed, monkeypatch):
    """Of each layer's retain heads, then those of the domains that are active."""
    differentiated, inner = [], pytorch.attend
    monkeypatch.setattr(pytorch, "attend", lambda q, *rest: differentiated.append(q.requires_grad) or inner(q, *rest))
    batch = random_step("step", seed=3, label=label)[0]
    model_of("gpt_neo")(batch.input_ids, batch.targets, plan_of(batch, tables(*masked)), 1.0)
    assert differentiated == computed


@by_family
@pytest.mark.parametrize("masked", [(), ("embedding",), ("head",), ("embedding", "head")], ids=" ".join)
def test_a_tied_matrix_learns_what_lookup_and_head_do(family, masked):
    batches = random_step("step", seed=2)
    tied, untied = (model_of(family, tie_embeddings=tie) for tie in (True, False))
    untied.load_state_dict(tied.state_dict() | {"head": tied.embedding.detach().clone()})
    one, two = (gradients(model, batches, tables(*masked)) for model in (tied, untied))
    torch.testing.assert_close(one["embedding"], two["embedding"] + two["head"], rtol=1e-5, atol=1e-6)
    for name in ("embedding", "head"):
        assert bool(two[name].any()) == (name not in masked), name
    assert one["embedding"].is_contiguous() and bool(one["embedding"].any()) == (len(masked) < 2)
