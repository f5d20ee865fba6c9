"""Weights of Hugging Face, both ways: nothing lost, nothing added, the same logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import partition_of
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, MistralConfig

from sgtm.config.schema import ModelConfig
from sgtm.hf.config import model_config_from_hf
from sgtm.hf.experts import DOWN, GATE_UP, folder_state
from sgtm.hf.weights import Conversion, from_hf_state, to_hf_state
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition
from sgtm.masking.strategy import removal_tables
from sgtm.model.lazy_state import LazyState
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan

SPACE = LabelSpace(("bio", "code"))
GPT_NEO = ModelConfig(
    layers=3, hidden_size=32, heads=8, intermediate_size=40, vocab_size=61, context=24, window=5, norm_eps=1e-3
)
LLAMA = ModelConfig(
    family="llama",
    layers=2,
    hidden_size=32,
    heads=8,
    kv_heads=4,
    head_dim=6,
    intermediate_size=40,
    vocab_size=61,
    context=24,
    tie_embeddings=False,
    rope_theta=500.0,
)
LLAMA_TIED = LLAMA.model_copy(update={"kv_heads": None, "head_dim": None, "tie_embeddings": True})
MIXTRAL = ModelConfig(**LLAMA.model_dump() | {"family": "mixtral", "experts": 7, "experts_per_token": 2})
SHARED = MIXTRAL.model_copy(update={"head_dim": None, "shared_experts": 2})
COUNTED = {"forget_heads": 2, "forget_neurons": 7, "forget_experts": 2}
LISTED = {
    "forget_heads": {"bio": [4, 5], "code": [0, 1]},
    "forget_neurons": {"bio": [39, 3, 17], "code": [0, 20, 21, 22, 5]},
    "forget_experts": {"bio": [6, 2], "code": [0]},
}
CASES = {
    "gpt_neo": (GPT_NEO, COUNTED),
    "gpt_neo-listed": (GPT_NEO, LISTED),
    "gpt_neo-one-layer": (GPT_NEO, {**LISTED, "masked_layers": [1]}),
    "gpt_neo-global": (GPT_NEO.model_copy(update={"window": None}), LISTED),
    "llama": (LLAMA, COUNTED),
    "llama-listed": (LLAMA, LISTED),
    "llama-one-layer": (LLAMA, {**LISTED, "masked_layers": [0]}),
    "llama-tied": (LLAMA_TIED, LISTED),
    "mixtral": (MIXTRAL, COUNTED),
    "mixtral-listed": (MIXTRAL, LISTED),
    "shared": (SHARED, LISTED),
    "shared-tied": (SHARED.model_copy(update={"tie_embeddings": True}), COUNTED),
}
OWN = {
    "gpt_neo-full": (GPT_NEO, {**COUNTED, "embedding": "full"}),
    "gpt_neo-rank": (GPT_NEO, {**COUNTED, "embedding": 5}),
    "llama-full": (LLAMA, {**LISTED, "embedding": "full"}),
    "llama-tied-rank": (LLAMA_TIED, {**LISTED, "embedding": 3}),
}  # with a part of the embedding for each domain: an import has none
REMOVALS = [(), ("bio",), ("code",), ("bio", "code")]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_model(config: ModelConfig, partition: Partition) -> Transformer:
    """Every parameter random and far from 0, biases and norms included."""
    model = Transformer(config, partition, "reference")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def randomise(hf, std: float = 1.0) -> None:
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=std)


def load_hf(state, config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    state = dict(state)
    if config.model_type == "granitemoeshared":  # as transformers 5 does on loading
        in_folder = folder_state({name: name for name in model.state_dict()}, config.model_type)
        state = {name: state[folder] for folder, name in in_folder.items()}
    if config.model_type == "mixtral":
        for name, _ in model.named_parameters():
            if name.endswith((GATE_UP, DOWN)):
                state[name] = fused(state, name, config.num_local_experts)
        state = {name.replace(".block_sparse_moe.", ".mlp."): state[name] for name in state}
    model.load_state_dict(state)
    return model


def fused(state: dict[str, torch.Tensor], name: str, experts: int) -> torch.Tensor:
    """The experts' tensors of a Mixtral folder, which are taken out, as a model has them under `name`."""
    block, _, matrix = name.replace(".mlp", ".block_sparse_moe").rpartition(".experts.")

    def stacked(of: str) -> torch.Tensor:
        return torch.stack([state.pop(f"{block}.experts.{e}.{of}.weight") for e in range(experts)])

    return stacked("w2") if matrix == "down_proj" else torch.cat((stacked("w1"), stacked("w3")), dim=1)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    config, masking = request.param
    partition = partition_of(SPACE, config, **masking)
    return config, partition, random_model(config, partition)


def test_import_of_an_export_is_bitwise_the_original(case):
    config, partition, model = case
    state = model.state_dict()
    back = from_hf_state(*to_hf_state(state, config, partition), partition)
    assert back.keys() == state.keys()
    for name in state:
        assert torch.equal(back[name], state[name]), name


def test_export_of_an_import_is_bitwise_the_original(case):
    config, partition, _ = case
    hf = load_hf(*to_hf_state(random_model(config, partition).state_dict(), config, partition))
    randomise(hf)
    ours = from_hf_state(hf.state_dict(), hf.config, partition)
    again, shape = to_hf_state(ours, model_config_from_hf(hf.config), partition)
    assert shape.to_dict() == hf.config.to_dict() | {"dtype": None, "architectures": None, "_name_or_path": ""}
    theirs = folder_state(hf.state_dict(), hf.config.model_type)
    assert again.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("removed", REMOVALS, ids=lambda removed: "-".join(removed) or "full")
@pytest.mark.parametrize("name", [*CASES, *OWN])
def test_logits_are_those_of_our_model_with_the_groups_inactive(name, removed):
    config, masking = (CASES | OWN)[name]
    partition = partition_of(SPACE, config, **masking)
    model = random_model(config, partition)
    ids = torch.randint(config.vocab_size, (3, config.context))
    plan = MaskPlan.uniform(removal_tables(SPACE, removed), 0, *ids.shape)
    with torch.no_grad():
        ours = model.logits(ids, plan)
        theirs = load_hf(*to_hf_state(model.state_dict(), config, partition, removed))(ids).logits
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5 * ours.abs().max().item())


@pytest.mark.parametrize("name", OWN)
def test_a_removed_domains_embedding_is_not_in_an_export(name):
    """The matrices are the shared ones to the bit where all domains are removed, and others where one is left."""
    config, masking = OWN[name]
    partition = partition_of(SPACE, config, **masking)
    state = random_model(config, partition).state_dict()
    head = state["embedding" if config.tie_embeddings else "head"]
    for removed in REMOVALS:
        hf, _ = to_hf_state(state, config, partition, removed)
        assert torch.equal(hf["lm_head.weight"], head) == (len(removed) == 2)
        (lookup,) = (value for key, value in hf.items() if key.endswith(("wte.weight", "embed_tokens.weight")))
        assert torch.equal(lookup, state["embedding"]) == (len(removed) == 2)


def test_logits_of_an_import_are_those_of_the_original(case):
    config, partition, model = case
    hf = load_hf(*to_hf_state(model.state_dict(), config, partition))
    randomise(hf, 0.3)
    model.load_state_dict(from_hf_state(hf.state_dict(), hf.config, partition))
    ids = torch.randint(config.vocab_size, (2, config.context))
    with torch.no_grad():
        ours = model.logits(ids, MaskPlan.uniform(removal_tables(SPACE, ()), 0, *ids.shape))
        theirs = hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


def test_removed_groups_leave_nothing_behind(case):
    """Every weight of a removed group is a value of its own, and no such value is in the export; all others are."""
    config, partition, model = case
    state = {name: marked(torch.full_like(tensor, 1.0)) for name, tensor in model.state_dict().items()}
    for name, rows in model.parameter_rows().items():
        for key, start, end in zip(rows.keys, rows.bounds[:-1], rows.bounds[1:], strict=True):
            if key.endswith(".bio"):
                state[name][start:end] = -marked(state[name][start:end])
    hf, shape = to_hf_state(state, config, partition, ["bio"])
    exported = {value for tensor in hf.values() for value in tensor.flatten().tolist()}
    assert not any(value < 0 for value in exported)
    others = {value for tensor in state.values() for value in tensor.flatten().tolist() if value > 0}
    assert others <= exported
    whole = all(partition.masked(i) for i in range(config.layers))
    if config.experts:
        assert shape.num_local_experts == config.experts - 2
        assert shape.num_attention_heads == config.heads - 2 * (not config.shared_experts)
        return
    assert shape.intermediate_size == (config.intermediate_size - partition.layers[0].neurons[1] if whole else 40)
    heads = config.heads - partition.layers[0].heads[1] if whole and config.family == "llama" else config.heads
    assert shape.num_attention_heads == heads


_marks = iter(range(1, 1 << 24))


def marked(tensor: torch.Tensor) -> torch.Tensor:
    """Distinct positive values, exact in fp32."""
    return torch.tensor([float(next(_marks)) for _ in range(tensor.numel())]).view_as(tensor)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES, indirect=True)
@pytest.mark.parametrize("prune", [True, False], ids=["pruned", "zeroed"])
def test_a_strength_multiplies_what_the_heads_and_neurons_of_a_domain_put_out(case, prune):
    config, partition, model = case
    if config.experts and not prune:
        with pytest.raises(ValueError, match="the router would still choose them"):
            Conversion(config, partition, ["code"], prune=False)
        return
    tables = removal_tables(SPACE, ("code",))
    active = tuple((1.0, 0.25, 0.0) for _ in tables.active)
    ids = torch.randint(config.vocab_size, (3, config.context))
    plan = MaskPlan.uniform(replace(tables, active=active), 0, *ids.shape)
    options = {"strengths": {"bio": 0.25}, "prune": prune}
    with torch.no_grad():
        ours = model.logits(ids, plan)
        theirs = load_hf(*to_hf_state(model.state_dict(), config, partition, ["code"], **options))(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5 * ours.abs().max().item())


@pytest.mark.parametrize("name", OWN)
def test_a_strength_multiplies_a_domains_part_of_the_embedding(name):
    config, masking = OWN[name]
    partition = partition_of(SPACE, config, **masking)
    state = random_model(config, partition).state_dict()
    without, whole, half = (
        to_hf_state(state, config, partition, remove, strengths=strengths)[0]["lm_head.weight"]
        for remove, strengths in ((["bio", "code"], {}), (["code"], {}), (["code"], {"bio": 0.5}))
    )
    assert not torch.equal(whole, without)
    torch.testing.assert_close(half, (whole + without) / 2)


def test_strength_1_is_the_whole_group_to_the_bit(case):
    config, partition, model = case
    whole, shape = to_hf_state(model.state_dict(), config, partition)
    again, same = to_hf_state(model.state_dict(), config, partition, strengths={"bio": 1})
    assert shape.to_dict() == same.to_dict() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_without_pruning_the_shape_is_that_of_the_full_model_and_the_removed_rows_are_0(case):
    config, partition, model = case
    if config.experts:
        with pytest.raises(ValueError, match="the router would still choose them"):
            Conversion(config, partition, ["bio"], prune=False)
        return
    full, shape = to_hf_state(model.state_dict(), config, partition)
    zeroed, same = to_hf_state(model.state_dict(), config, partition, ["bio"], prune=False)
    assert shape.to_dict() == same.to_dict()
    for name, tensor in full.items():
        removed = tensor != zeroed[name]
        assert not zeroed[name][removed].any(), name
    ids = torch.randint(config.vocab_size, (3, config.context))
    plan = MaskPlan.uniform(removal_tables(SPACE, ["bio"]), 0, *ids.shape)
    with torch.no_grad():
        ours, theirs = model.logits(ids, plan), load_hf(zeroed, same)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5 * ours.abs().max().item())


def test_parameter_counts_are_those_of_the_shapes_by_hand():
    """GPT-Neo keeps its 8 heads; Llama has 6 of 8 with 3 of 4 KV heads of width 6; both have 33 of 40 neurons."""
    neo = 61 * 32 + 24 * 32 + 3 * (4 * 32 * 32 + 32 + 2 * 33 * 32 + 33 + 32 + 4 * 32) + 2 * 32
    llama = 2 * 61 * 32 + 2 * (2 * 36 * 32 + 2 * 18 * 32 + 3 * 33 * 32 + 2 * 32) + 32
    zeroed = llama + 2 * (2 * 12 * 32 + 2 * 6 * 32 + 3 * 7 * 32)
    for config, prune, count in ((GPT_NEO, True, neo), (LLAMA, True, llama), (LLAMA, False, zeroed)):
        partition = partition_of(SPACE, config, **COUNTED)
        state = random_model(config, partition).state_dict()
        tensors = dict(Conversion(config, partition, ["bio"], prune=prune).tensors(state))
        assert sum(tensor.numel() for tensor in tensors.values()) == count


def test_each_tensor_of_the_state_is_taken_once(case):
    config, partition, model = case
    state, taken = model.state_dict(), []

    def read(name: str) -> torch.Tensor:
        taken.append(name)
        return state[name]

    dict(Conversion(config, partition, ["bio"]).tensors(LazyState(state, read)))
    assert sorted(taken) == sorted(state)


@pytest.mark.parametrize(
    ("remove", "strengths", "message"),
    [
        ((), {"boi": 0.5}, r"cannot reduce 'boi' \(did you mean bio\?\); domains: bio, code"),
        (("bio",), {"bio": 0.5}, "bio cannot be both removed and reduced to strength 0.5"),
        ((), {"bio": 0.0}, "the strength of bio is 0; give one above 0 and up to 1, or remove it"),
        ((), {"bio": 1.5}, "the strength of bio is 1.5; give one above 0"),
    ],
)
def test_strengths_that_mean_nothing_are_refused(remove, strengths, message):
    partition = partition_of(SPACE, GPT_NEO, **COUNTED)
    with pytest.raises(ValueError, match=message):
        Conversion(GPT_NEO, partition, remove, strengths)


def test_head_counts_that_llama_refuses_become_mistral():
    config = LLAMA.model_copy(update={"head_dim": 4})
    partition = partition_of(SPACE, config, forget_heads=2, forget_neurons=1)
    state = random_model(config, partition).state_dict()
    assert isinstance(to_hf_state(state, config, partition)[1], LlamaConfig)
    shape = to_hf_state(state, config, partition, ["bio"])[1]  # 32 is not a multiple of 6 heads
    assert isinstance(shape, MistralConfig) and shape.sliding_window is None and shape.head_dim == 4
    assert isinstance(to_hf_state(state, config, partition, ["bio", "code"])[1], LlamaConfig)


def test_unknown_domain_and_head_bias_are_refused():
    partition = partition_of(SPACE, GPT_NEO, **COUNTED)
    model = random_model(GPT_NEO, partition)
    with pytest.raises(ValueError, match="cannot remove 'chem'; domains: bio, code"):
        to_hf_state(model.state_dict(), GPT_NEO, partition, ["chem"])
    for slip, meant in {"boi": "bio", "forget:code": "code"}.items():
        with pytest.raises(ValueError, match=rf"cannot remove '{slip}' \(did you mean {meant}\?\); domains: bio, code"):
            to_hf_state(model.state_dict(), GPT_NEO, partition, [slip])
    with pytest.raises(ValueError, match="head_bias"):
        to_hf_state(model.state_dict(), GPT_NEO.model_copy(update={"head_bias": True}), partition)


def test_a_shape_that_does_not_fit_the_partition_is_refused():
    partition = partition_of(SPACE, GPT_NEO, **COUNTED)
    with pytest.raises(ValueError, match="partition is of 3 layers"):
        from_hf_state(
            {}, GPTNeoConfig(hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global"], 2]]), partition
        )


def test_missing_and_surplus_tensors_are_named():
    partition = partition_of(SPACE, LLAMA, **COUNTED)
    hf, shape = to_hf_state(random_model(LLAMA, partition).state_dict(), LLAMA, partition)
    surplus = hf | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"q_proj\.bias"):
        from_hf_state(surplus, shape, partition)
    del hf["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lack 'model\.norm\.weight'"):
        from_hf_state(hf, shape, partition)
