"""Masked Hugging Face models compute what ours do, and keep the promises: sgtm/integrations/hf.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import model_of
from hf_models import CONFIGS, MASKING, MIXED, VOCAB, by_key, differing, gradients_of, masked_model, plain_model
from hf_models import random_ids as ids_of
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sgtm.config.sections import MaskingConfig
from sgtm.hf.weights import to_hf_state
from sgtm.integrations.binding import Bound
from sgtm.integrations.hf import ablate, apply_sgtm, without_domains
from sgtm_kernels.plan import MaskPlan, merge_label_runs

FAMILIES = list(CONFIGS)
ALL_BUT = {"attn_in.bio", "attn_out.bio", "mlp_in.bio", "mlp_out.bio"}
SETTINGS = [
    {"strategy": "sgtm"},
    {"strategy": "sgtm", "joint": "masked"},
    {"strategy": "sgtm", "joint": "strict", "cross_domain": "active"},
    {"strategy": "no_out"},
    {"strategy": "gradient_routing"},
    {"strategy": "activation_masking", "masked_layers": [1]},
    {"strategy": "gram"},
    {"strategy": "sgtm", "overrides": {"update.forget:bio.retain.mlp_out": 0.5, "active.unlabeled.code": 0.25}},
    {"strategy": "none"},
]


def ours_and_theirs(family: str, setting: dict):
    """Our transformer, and the Hugging Face model with its weights, masked."""
    ours = model_of(
        family, masked_layers=setting.get("masked_layers"), **({"head_bias": False} if family == "gpt_neo" else {})
    )
    state, config = to_hf_state(dict(ours.state_dict()), ours.config, ours.partition)
    if family == "gpt_neo":
        config.resid_dropout = config.embed_dropout = config.attention_dropout = 0.0
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(state)
    share = ours.config.heads // ours.config.num_kv_heads
    return ours, apply_sgtm(theirs.train(), MASKING | {"forget_heads": share} | setting)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["gpt_neo", "llama"])
def test_gradients_are_those_of_our_transformer(family, setting):
    ours, theirs = ours_and_theirs(family, setting)
    ids, targets = ids_of(), ids_of(seed=1)
    tables = theirs.sgtm.tables
    plan = MaskPlan(tables, merge_label_runs([tables.labels.index(name) for name in MIXED], [12] * 5), 5, 12)
    ours(ids, targets, plan, 1 / targets.numel())[0].backward()
    F.cross_entropy(theirs(input_ids=ids, sgtm_labels=MIXED).logits.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted, _ = to_hf_state(gradients, ours.config, ours.partition)
    for name, parameter in theirs.named_parameters():
        error = (parameter.grad - wanted[name]).abs().max()
        assert error <= 4e-6 * wanted[name].abs().max(), name
        assert torch.equal(parameter.grad == 0, wanted[name] == 0), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_and_gradients_of_unlabeled_tokens_are_the_plain_ones(family):
    plain, masked = plain_model(family), masked_model(family)
    ids = ids_of()
    expected, got = plain(input_ids=ids, labels=ids), masked(input_ids=ids, labels=ids, sgtm_labels=[0] * len(ids))
    assert torch.equal(got.logits, expected.logits)
    expected.loss.backward(), got.loss.backward()
    for (name, theirs), ours in zip(plain.named_parameters(), masked.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-6 * theirs.grad.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [MIXED, MIXED * 4], ids=["slices", "weights of tokens"])
def test_only_the_groups_of_a_domain_depend_on_its_tokens(family, labels):
    model = masked_model(family, joint="strict")
    ids = ids_of(len(labels))
    other = torch.where(torch.tensor([label == "forget:bio" for label in labels])[:, None], ids_of(len(labels), 1), ids)
    before, after = (by_key(model, gradients_of(model, x, labels)) for x in (ids, other))
    assert differing(before, after) == ALL_BUT


@pytest.mark.parametrize("family", FAMILIES)
def test_without_joint_the_retain_group_does_not_depend_on_forget_tokens(family):
    model = masked_model(family)
    ids, other = ids_of(), ids_of()
    other[0] = ids_of(seed=1)[0]
    changed = differing(*(by_key(model, gradients_of(model, x, MIXED)) for x in (ids, other)))
    assert not {key for key in changed if key.endswith((".retain", ".code", "_bias"))}
    assert {"norm", "final_norm"} <= changed  # as `free` leaves them


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", ["retain", "forget:code", "open:code"])
def test_a_group_learns_exactly_nothing_from_other_tokens(family, label):
    model = masked_model(family)
    for (key, name, _), gradient in by_key(model, gradients_of(model, ids_of(), [label] * 5)).items():
        if key.endswith(".bio"):
            assert not gradient.any(), name
        if key.endswith(".code"):
            assert gradient.any() == (label != "retain"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_forget_tokens_leave_exact_zeros(family):
    model = masked_model(family, joint="strict")
    for (key, name, _), gradient in by_key(model, gradients_of(model, ids_of(), ["forget:bio"] * 5)).items():
        assert gradient.any() == key.endswith(".bio"), (key, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_names_state_and_config_stay(family, tmp_path):
    plain, model = plain_model(family), plain_model(family)
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    assert apply_sgtm(model, MaskingConfig(**MASKING)) is model
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(plain) and not hasattr(loaded, "sgtm")
    states = [dict(x.state_dict()) for x in (plain, model, loaded)]
    assert all(x.keys() == states[0].keys() for x in states)
    assert all(torch.equal(x[name], states[0][name]) for x in states for name in x)


@pytest.mark.parametrize("family", FAMILIES)
def test_removed_computes_what_ablate_does(family):
    plain, model = plain_model(family).eval(), masked_model(family).eval()
    ids = ids_of()
    with torch.no_grad():
        full = model(input_ids=ids).logits
        assert torch.equal(full, plain(input_ids=ids).logits)
        with ablate(model, ["bio"]):
            ablated = model(input_ids=ids, sgtm_labels=["forget:bio"] * 5).logits
            with ablate(model, ["bio", "code"]):
                both = model(input_ids=ids).logits
        without = without_domains(model, ["bio"])
        assert torch.equal(without(input_ids=ids).logits, ablated)
        assert torch.equal(model(input_ids=ids, sgtm_labels=["retain"] * 5).logits, full)  # of no use without gradients
        assert not torch.equal(ablated, full) and not torch.equal(both, ablated)
    for (key, name, _), weights in by_key(model, dict(without.named_parameters())).items():
        assert weights.any() != key.endswith(".bio"), name


def test_removed_has_the_dtypes_of_the_model_and_its_buffers_bits(tmp_path):
    """Rotary frequencies stay fp32 in a model that is loaded in bf16; so does what was cast to another dtype."""
    shape = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=512, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    model.model.norm.float(), model.lm_head.float()
    apply_sgtm(model, {"domains": ["bio"], "forget_heads": 1, "forget_neurons": 4})
    ids = torch.randint(VOCAB, (1, 512))
    without = without_domains(torch.compile(model, backend="eager"), ["bio"])
    with torch.no_grad(), ablate(model, ["bio"]):
        assert torch.equal(without(input_ids=ids).logits, model(input_ids=ids).logits)
    assert without.model.norm.weight.dtype == torch.float32
    assert without.model.rotary_emb.inv_freq.dtype == torch.float32


def test_removed_leaves_nothing_of_the_masks():
    model = masked_model("llama")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids_of(), sgtm_labels=["retain"] * 5)
    plain = without_domains(model, ["bio"])
    assert type(plain) is LlamaForCausalLM and not any(hasattr(module, "sgtm") for module in plain.modules())
    assert not any(isinstance(module, Bound) for module in plain.modules())
    assert not plain._forward_pre_hooks and len(plain._forward_hooks) == 1  # the user's
    plain.train()(input_ids=ids_of()).logits.sum().backward()
    pickle.loads(pickle.dumps(plain.model))
    assert len(calls) == 2 and len(model._forward_hooks) == 2 and isinstance(model.model.layers[0], Bound)


def test_generation_runs_ablated():
    model = masked_model("llama").eval()
    prompt = ids_of(1)[:, :4]
    with ablate(model, ["bio"]):
        got = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(
        got, without_domains(model, ["bio"]).generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    )


def test_a_copy_has_a_binding_of_its_own():
    model = masked_model("gpt2")
    other = copy.deepcopy(model)
    assert other.sgtm is not model.sgtm and other.transformer.h[0].mlp.c_fc.sgtm is other.sgtm
    assert not differing(*(by_key(x, gradients_of(x, ids_of(), MIXED)) for x in (model, other)))


@pytest.mark.parametrize(
    ("masking", "message"),
    [
        ({"forget_heads": 1}, "2 query heads share a KV head"),
        ({"forget_heads": 4}, "leaves no retain member"),
        ({"forget_neurons": 5}, "leaves no retain member"),
        ({"forget_heads": {"bio": [0, 1], "code": [2, 3]}}, "masking.forget_heads .* the last ones of each layer"),
        ({"masked_layers": [2]}, "a layer outside 0..1"),
        ({"domain_embedding": 4}, "masking.domain_embedding 4"),
        ({"certify": True}, "masking.certify true"),
        ({"strategie": "sgtm"}, "strategie"),
    ],
)
def test_settings_that_do_not_fit_are_refused(masking, message):
    model = plain_model("llama")
    with pytest.raises(ValueError, match=message):
        apply_sgtm(model, MASKING | masking)
    assert not hasattr(model, "sgtm") and type(model.lm_head) is torch.nn.Linear


def test_masked_twice_and_unknown_models_are_refused():
    model = masked_model("llama")
    with pytest.raises(ValueError, match="masked already"):
        apply_sgtm(model, MASKING)
    with pytest.raises(ValueError, match=r"LlamaModel .*pass the causal LM"):
        apply_sgtm(plain_model("llama").model, MASKING)
    with pytest.raises(ValueError, match=r"Linear .*cannot be masked"):
        apply_sgtm(torch.nn.Linear(2, 2), MASKING)
    with pytest.raises(ValueError, match="Linear is not masked"), ablate(torch.nn.Linear(2, 2), ["bio"]):
        pass
    with pytest.raises(ValueError, match="unknown domain 'bip'"), ablate(model, ["bip"]):
        pass
    with pytest.raises(ValueError, match="give a list"):
        without_domains(model, "bio")


def test_what_the_masks_would_miss_is_refused():
    model = plain_model("llama")
    model.model.layers[0].mlp.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.adapter \(Linear\) is unknown"):
        apply_sgtm(model, MASKING)
    model = plain_model("llama")
    model.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no mask covers the parameters extra"):
        apply_sgtm(model, MASKING)
    model = plain_model("llama")
    model.model.layers[1].mlp.up_proj.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="Linear4bit"):
        apply_sgtm(model, MASKING)
