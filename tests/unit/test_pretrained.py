"""A Hugging Face folder as the start of a run: the same function, or an error that names what differs.

Which heads and neurons become the domains' is `tests/unit/test_weights.py`'s: the whole model's logits cannot tell.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import partition_of
from safetensors.torch import load_file, save_file
from tokenizer_folders import KINDS, write_folder
from transformers import AutoModelForCausalLM

from sgtm.config.schema import ModelConfig
from sgtm.data.plain_text import plain_text
from sgtm.data.tokenizer import EOS, train_bpe
from sgtm.hf.config import hf_config
from sgtm.hf.pretrained import check_tokenizer, load_pretrained
from sgtm.masking.labels import LabelSpace
from sgtm.masking.partition import Partition
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer
from sgtm_kernels.plan import MaskPlan

SPACE = LabelSpace(("es",))
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "intermediate_size": 24, "vocab_size": 61, "context": 16}
MODELS = {
    "gpt_neo": ModelConfig(**SHAPE, window=5),
    "llama": ModelConfig(family="llama", kv_heads=2, head_dim=6, tie_embeddings=False, rope_theta=500.0, **SHAPE),
    "llama-tied": ModelConfig(family="llama", **SHAPE),
    "mixtral": ModelConfig(family="mixtral", experts=4, experts_per_token=2, kv_heads=2, head_dim=6, **SHAPE),
    "shared": ModelConfig(family="mixtral", experts=4, experts_per_token=2, shared_experts=2, **SHAPE),
}


def changed(config: ModelConfig, **keys) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | keys)


def es_partition(config: ModelConfig) -> Partition:
    share = config.heads // config.num_kv_heads
    mlp = {"forget_neurons": {"es": [20, 1, 3]}, "forget_experts": {"es": [1]}}
    return partition_of(SPACE, config, forget_heads={"es": list(range(share))}, **mlp)


def write(folder, config: ModelConfig, **options) -> AutoModelForCausalLM:
    shape = hf_config(config, heads=config.heads, kv_heads=config.num_kv_heads, experts=config.experts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "9KB"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("context", [16, 11])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_the_folder_does(tmp_path, name, context, options):
    hf = write(tmp_path, MODELS[name], **options)
    assert (tmp_path / "model.safetensors").exists() != ("max_shard_size" in options)
    config = changed(MODELS[name], context=context, init_std=0.5)
    model = Transformer(config, es_partition(config))
    model.load_state_dict(load_pretrained(tmp_path, config, es_partition(config)))
    ids = torch.randint(61, (2, context))
    with torch.no_grad():
        ours = model.logits(ids, MaskPlan.uniform(removal_tables(SPACE, ()), 0, *ids.shape))
        theirs = hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt_neo", {"hidden_size": 64}),
        ("gpt_neo", {"layers": 3, "intermediate_size": 96}),
        ("gpt_neo", {"vocab_size": 128}),
        ("gpt_neo", {"context": 17}),
        ("gpt_neo", {"window": 6}),
        ("gpt_neo", {"head_bias": True}),
        ("gpt_neo", {"norm_eps": 1e-3}),
        ("llama", {"heads": 8}),
        ("llama", {"kv_heads": 4}),
        ("llama", {"head_dim": 8}),
        ("llama", {"rope_theta": 1e4}),
        ("llama", {"tie_embeddings": True}),
        ("mixtral", {"experts": 5}),
        ("mixtral", {"experts_per_token": 3}),
        ("shared", {"shared_experts": 1}),
    ],
)
def test_what_differs_from_the_config_is_named(tmp_path, name, keys):
    write(tmp_path, MODELS[name])
    config = changed(MODELS[name], **keys)
    with pytest.raises(ValueError, match=rf"train\.init_from {tmp_path}: it is another model") as caught:
        load_pretrained(tmp_path, config, es_partition(config))
    before = MODELS[name].model_dump()
    lines = [f"  model.{key}: {before[key]} there, {value} in the config" for key, value in keys.items()]
    differences = [line for line in str(caught.value).splitlines()[1:] if "head_dim" in keys or "head_dim" not in line]
    assert sorted(differences) == sorted(lines)


def test_a_run_directory_and_a_name_of_the_hub_are_refused_with_the_remedy(tmp_path):
    config = MODELS["gpt_neo"]
    with pytest.raises(ValueError, match=r"train\.init_from gpt2: .*names of the Hugging Face hub are not looked up"):
        load_pretrained("gpt2", config, es_partition(config))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=rf"export it first: sgtm export {tmp_path} --out FOLDER"):
        load_pretrained(tmp_path, config, es_partition(config))


def test_another_family_is_refused(tmp_path):
    write(tmp_path, MODELS["llama-tied"])
    with pytest.raises(ValueError, match=r"model\.family: llama there, gpt_neo in the config"):
        load_pretrained(tmp_path, MODELS["gpt_neo"], es_partition(MODELS["gpt_neo"]))


def damage_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(25, 32)
    save_file(weights, folder / "model.safetensors")


def damage_name(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.bias"]
    save_file(weights, folder / "model.safetensors")


def damage_activation(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "relu"}))


def with_config(**keys):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | keys))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damage_shape,
            r"the weights do not have the shapes of config\.json \(transformer\.h\.1\.mlp\.c_fc\.weight is \[25, 32\]",
        ),
        (damage_name, r"lack 'transformer\.ln_f\.bias'"),
        (damage_activation, "activation_function is 'relu'"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "weights are damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights as safetensors"),
        (with_config(num_layers="two"), r"config\.json cannot be read"),
        (with_config(attention_types=5), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json cannot be read"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
            "weights are damaged",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), r"no config\.json there"),
    ],
    ids=[
        "shape",
        "name",
        "activation",
        "damaged",
        "missing",
        "type",
        "types",
        "list",
        "index",
        "not JSON",
        "no model",
        "no config",
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_that_says_why(tmp_path, damage, message):
    write(tmp_path, MODELS["gpt_neo"])
    damage(tmp_path)
    with pytest.raises(ValueError, match=rf"train\.init_from {tmp_path}: .*{message}"):
        load_pretrained(tmp_path, MODELS["gpt_neo"], es_partition(MODELS["gpt_neo"]))


def test_a_corpus_of_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    ours, theirs = (train_bpe([word * 9], 259) for word in ("abab ", "cdcd "))
    corpus = SimpleNamespace(path="data/mine", tokenizer=ours)
    check_tokenizer(tmp_path, corpus)  # a folder without one says nothing
    ours.save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(tmp_path, corpus)
    theirs.save(str(tmp_path / "tokenizer.json"))
    message = (
        rf"init_from {tmp_path} has another tokenizer than the corpus data/mine: 2 ids .*257 for 'cd' there and 'ab'"
    )
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tmp_path, corpus)


@pytest.mark.parametrize("written", [("rope_theta",), ("rope_parameters",), ("rope_theta", "rope_parameters")])
def test_the_base_of_the_rotation_is_read_in_both_spellings(tmp_path, written):
    """Transformers 4 writes `rope_theta`, 5 `rope_parameters`, an export both."""
    write(tmp_path, MODELS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    spellings = {"rope_theta": 500.0, "rope_parameters": config.pop("rope_parameters")}
    config |= {key: spellings[key] for key in written}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_pretrained(tmp_path, MODELS["llama"], es_partition(MODELS["llama"]))
    with pytest.raises(ValueError, match=r"model\.rope_theta: 500\.0 there, 10000\.0 in the config"):
        other = changed(MODELS["llama"], rope_theta=1e4)
        load_pretrained(tmp_path, other, es_partition(other))


def test_the_tokenizer_of_a_corpus_is_that_of_its_folder(tmp_path):
    """`prepare` stores it changed, so that text is text; the ids of all tokens are the same."""
    for name, (make, _) in KINDS.items():
        folder = write_folder(tmp_path / name, make(), eos_token=EOS)
        check_tokenizer(folder, SimpleNamespace(path="data/mine", tokenizer=plain_text(make(), {EOS})))
