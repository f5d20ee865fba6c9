"""The plan of a call belongs to the call: sgtm/integrations/binding.py."""

from __future__ import annotations

import pickle
import threading

import pytest
import torch
from hf_models import CONFIGS, MIXED, by_key, differing, gradients_of, masked_model
from hf_models import random_ids as ids_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from sgtm.integrations.binding import Binding, binding_of
from sgtm.integrations.families import blocks_of
from sgtm.integrations.hf import SgtmAdamW, ablate

FAMILIES = list(CONFIGS)
BIO, RETAIN = ["forget:bio"] * 3, ["retain"] * 3


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_recomputes_with_the_plan_of_its_own_micro_batch(family, reentrant):
    model = masked_model(family, joint="masked")
    first, second = ids_of(3), ids_of(3, 1)
    apart = [by_key(model, gradients_of(model, ids, labels)) for ids, labels in ((first, BIO), (second, RETAIN))]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    losses = [model(input_ids=x, labels=x, sgtm_labels=y).loss for x, y in ((first, BIO), (second, RETAIN))]
    for loss, expected in zip(losses, apart, strict=True):
        model.zero_grad()
        loss.backward()
        got = by_key(model, {name: p.grad for name, p in model.named_parameters()})
        assert differing(expected, got) == set()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_wrapper_recomputes_with_the_plan_of_its_own_micro_batch(family):
    """As FSDP and torchtitan checkpoint layers; the names of the parameters are those of the wrapper then."""
    model, whole = masked_model(family, joint="masked"), masked_model(family, joint="masked")
    model.config.use_cache = False
    layers, optimizers = blocks_of(model), []
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    first, second = ids_of(3), ids_of(3, 1)
    for masked in (model, whole):
        losses = [masked(input_ids=x, labels=x, sgtm_labels=y).loss for x, y in ((first, BIO), (second, RETAIN))]
        for loss in losses:
            loss.backward()
        optimizers.append(SgtmAdamW(masked, lr=0.1))
        optimizers[-1].step()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad) and torch.equal(ours, theirs), name
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())


def test_a_head_that_a_loss_calls_with_parts_has_the_labels_of_the_last_call():
    model = masked_model("llama")
    model(input_ids=ids_of(5), sgtm_labels=MIXED)
    plan = model.sgtm.plan_of_part(torch.zeros(5, 4, 16))
    assert model.sgtm.plan is None and (plan.batch, plan.seq_len) == (5, 4)
    assert plan.labels(torch.device("cpu")).view(5, 4)[:, 0].tolist() == [2, 1, 0, 3, 1]
    with torch.no_grad():
        model.eval()(input_ids=ids_of(5))
    assert model.sgtm.plan_of_part(torch.zeros(5, 4, 16)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_labels_is_an_error(family):
    model = masked_model(family)
    with pytest.raises(ValueError, match="training mode and got no sgtm_labels"):
        model(input_ids=ids_of())
    with pytest.raises(ValueError, match="training mode and got no sgtm_labels"):
        model.base_model(input_ids=ids_of())
    with pytest.raises(ValueError, match="training mode and got no sgtm_labels"):
        model(inputs_embeds=torch.ones(2, 3, 16))
    with torch.no_grad():
        plain = model(input_ids=ids_of()).logits
    assert torch.equal(model.eval()(input_ids=ids_of()).logits, plain)
    assert not model.sgtm.trained


def test_a_checkpoint_of_the_whole_model_computes_twice_the_same():
    """The reentrant one runs first without gradients."""
    model, ids = masked_model("llama"), ids_of()
    expected = gradients_of(model, ids, MIXED)
    model.zero_grad()
    embeddings = torch.nn.functional.embedding(ids, model.get_input_embeddings().weight)
    loss = checkpoint(
        lambda x: model(inputs_embeds=x, labels=ids, sgtm_labels=MIXED).loss, embeddings, use_reentrant=True
    )
    assert torch.equal(loss, model(input_ids=ids, labels=ids, sgtm_labels=MIXED).loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]) or name == "model.embed_tokens.weight", name


def test_a_failed_call_leaves_no_plan():
    model = masked_model("llama")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids_of() + 1000, sgtm_labels=MIXED)
    assert model.sgtm.plan is None
    with pytest.raises(ValueError, match="training mode and got no sgtm_labels"):
        model(input_ids=ids_of())


def test_labels_are_names_or_numbers():
    model = masked_model("gpt2")
    expected = by_key(model, gradients_of(model, ids_of(), MIXED))
    for labels in ((2, 1, 0, 3, 1), torch.tensor([2, 1, 0, 3, 1]), [torch.tensor(2), 1, "unlabeled", 3, "retain"]):
        assert differing(expected, by_key(model, gradients_of(model, ids_of(), labels))) == set()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (MIXED[:4], "has 4 labels for 5 sequences"),
        (("bio",) * 5, "unknown label 'bio'"),
        ((6,) * 5, "sgtm_labels has 6; known labels: 0 unlabeled, 1 retain, 2 forget:bio"),
        ((-1,) * 5, "sgtm_labels has -1"),
        ((True,) * 5, "sgtm_labels has True"),
        ((1.0,) * 5, "sgtm_labels has 1.0"),
        (torch.ones(5, 12, dtype=torch.long), "a list of 12 labels for one sequence: labels of single tokens"),
        ("retain", "one label for each sequence"),
        (1, "one label for each sequence"),
    ],
)
def test_labels_that_are_none_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        masked_model("llama")(input_ids=ids_of(), sgtm_labels=labels)


def test_an_ablated_model_is_not_trained():
    model = masked_model("llama")
    with ablate(model, ["bio"]), pytest.raises(ValueError, match="an ablated model cannot be trained"):
        model(input_ids=ids_of(), sgtm_labels=MIXED)


def test_input_embeddings_and_positional_ids():
    model = masked_model("llama")
    ids = ids_of()
    by_keyword = model(input_ids=ids, sgtm_labels=MIXED).logits
    assert torch.equal(model(ids, sgtm_labels=MIXED).logits, by_keyword)
    embeddings = model.get_input_embeddings().weight.detach()[ids]
    assert torch.equal(model(inputs_embeds=embeddings, sgtm_labels=MIXED).logits, by_keyword)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_model_has_the_gradients_of_the_other(family):
    model = masked_model(family, joint="masked")
    expected = gradients_of(model, ids_of(), MIXED)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert binding_of(compiled) is model.sgtm
    for labels in (["retain"] * 5, MIXED):
        model.zero_grad()
        compiled(input_ids=ids_of(), labels=ids_of(), sgtm_labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).abs().max()
        assert error <= 1e-6 * expected[name].abs().max(), name
        assert torch.equal(parameter.grad == 0, expected[name] == 0), name
    with pytest.raises(ValueError, match="got no sgtm_labels"):
        compiled(input_ids=ids_of())


def test_what_is_current_belongs_to_a_thread():
    binding = masked_model("llama").sgtm
    seen = []
    with binding.using("plan"):  # type: ignore[arg-type]
        thread = threading.Thread(target=lambda: seen.append(binding.plan))
        thread.start()
        thread.join()
        assert (binding.plan, seen) == ("plan", [None])
    copied = pickle.loads(pickle.dumps(binding))
    assert isinstance(copied, Binding) and copied.plan is None and copied.owned == binding.owned
