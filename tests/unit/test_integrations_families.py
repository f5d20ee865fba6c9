"""Where the groups of every family lie in its weights: sgtm/integrations/families.py."""

from __future__ import annotations

import pytest
import torch
from hf_models import CONFIGS, MASKING, by_key, masked_model, plain_model, random_ids

from sgtm.config.sections import MaskingConfig
from sgtm.integrations.families import FAMILIES, masked_modules, partition_of
from sgtm.integrations.hf import ablate
from sgtm.integrations.settings import space_of


def logits_without(model, domains) -> torch.Tensor:
    with torch.no_grad(), ablate(model, domains):
        return model(input_ids=random_ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_group_owns_reaches_the_logits_through_it_alone(family):
    """Any other element of a weight that were counted to the group would still change the ablated model."""
    model = masked_model(family).eval()
    full, ablated = logits_without(model, []), logits_without(model, ["bio"])
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    checked = 0
    for (key, name, start), piece in by_key(model, parameters).items():
        before = piece.clone()
        piece.mul_(-1.5).add_(0.1)
        if key.endswith(".bio"):
            assert torch.equal(logits_without(model, ["bio"]), ablated), (name, start)
            checked += 1
        else:
            assert not torch.equal(logits_without(model, ["bio", "code"]), ablated), (name, start)
        if "k_proj.bias" not in name and not (family == "gpt2" and name.endswith("c_attn.bias")):
            assert not torch.equal(logits_without(model, []), full), (name, start)
        piece.copy_(before)
    assert checked >= 2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_settings(family):
    model = masked_model(family, forget_heads={"bio": 2, "code": 4})
    grouped = "num_key_value_heads" in CONFIGS[family].to_dict()
    head = getattr(CONFIGS[family], "head_dim", None) or 2
    sizes: dict[str, int] = {}
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    for (key, name, _), piece in by_key(model, parameters).items():
        if ".0." in name and name.endswith("weight") and "." in key:
            sizes[key] = sizes.get(key, 0) + piece.numel() // 16
    heads_in = {group: count * head * (2 if grouped else 3) for group, count in (("bio", 2), ("code", 4))}
    gate = 2 if grouped else 1
    assert {group: sizes[f"attn_in.{group}"] for group in heads_in} == heads_in
    assert {group: sizes[f"attn_out.{group}"] for group in heads_in} == {"bio": 2 * head, "code": 4 * head}
    assert {group: sizes[f"mlp_in.{group}"] for group in heads_in} == {"bio": 3 * gate, "code": gate}
    assert {group: sizes[f"mlp_out.{group}"] for group in heads_in} == {"bio": 3, "code": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_an_owner(family):
    model = masked_model(family, masked_layers=[1])
    for name, parameter in model.named_parameters():
        owned = model.sgtm.owned[name]
        assert (owned.rows, owned.columns) == (*parameter.shape, 1)[:2]
        assert owned.bounds[0] == 0 and owned.bounds[-1] == parameter.shape[owned.dim]
        assert (owned.keys == ("always",)) == ((".0." in name and ".layers." in name) or ".h.0." in name), name


def test_a_tied_matrix_has_both_kinds():
    assert masked_model("qwen2").sgtm.owned["model.embed_tokens.weight"].keys == ("embedding+head",)
    llama = masked_model("llama").sgtm.owned
    assert (llama["model.embed_tokens.weight"].keys, llama["lm_head.weight"].keys) == (("embedding",), ("head",))


def test_layers_without_groups_stay_as_they_are():
    model = masked_model("llama", masked_layers=[1])
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    assert type(first) is torch.nn.Linear and type(second) is not torch.nn.Linear


def test_percent_rounds_to_whole_kv_groups():
    config = MaskingConfig(**(MASKING | {"percent": 20.0}))
    model = plain_model("llama")
    partition = partition_of(model, config, space_of(config))
    assert (partition.layers[0].heads, partition.layers[0].neurons) == ((4, 2, 2), (6, 2, 2))
    assert len(masked_modules(model, partition)) == 3 + 2 * 9


def test_groups_of_experts_are_refused():
    config = MaskingConfig(**(MASKING | {"forget_experts": 1}))
    with pytest.raises(ValueError, match=r"masking\.forget_experts 1: no model here has experts; set it 0"):
        partition_of(plain_model("llama"), config, space_of(config))


def test_modules_of_another_class_are_refused():
    model = plain_model("gpt2")
    model.transformer.ln_f = torch.nn.RMSNorm(16)
    config = MaskingConfig(**MASKING)
    with pytest.raises(ValueError, match=r"transformer.ln_f .*RMSNorm.* cannot be masked"):
        masked_modules(model, partition_of(model, config, space_of(config)))
    model = plain_model("gpt2")
    model.transformer.wte.max_norm = 1.0
    with pytest.raises(ValueError, match=r"transformer.wte .* cannot be masked"):
        masked_modules(model, partition_of(model, config, space_of(config)))
    model = plain_model("gpt2", add_cross_attention=True)
    with pytest.raises(ValueError, match=r"transformer.h.0.crossattention.\S+ .*is unknown"):
        masked_modules(model, partition_of(model, config, space_of(config)))
