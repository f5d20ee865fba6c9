"""The masked Llama of torchtitan, its configs and its batches, in one process: sgtm/integrations/torchtitan.py.

All that needs torchtitan is one call, as its imports take ten seconds.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import differing
from hf_steps import OWN, pieces_of
from ranks import run_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text("utf-8")
TITAN = Path(__file__).parents[2] / ".venv" / "torchtitan" / "torchtitan"
pytestmark = pytest.mark.skipif(not TITAN.is_dir(), reason="no torchtitan: make test installs it")
MIXED = ["forget:bio", "retain", "unlabeled", "forget:code", "retain"]


def on_one_rank() -> dict[str, Any]:
    import titan_models as titan

    facts: dict[str, Any] = {}
    for kind, config in (("fused", titan.llama_config()), ("apart", titan.llama_config(fused=False))):
        facts[kind] = facts_of_model(titan, config)
    facts["tied"] = facts_of_model(titan, titan.llama_config(tied=True))
    facts["both"] = fused_and_apart(titan)
    facts["transformers"] = beside_transformers(titan)
    facts["errors"] = errors(titan)
    facts["typed"], facts["documented"] = typed(titan), documented()
    facts["batches"] = batches(titan)
    return facts


def facts_of_model(titan, config) -> dict[str, Any]:
    model = titan.masked_llama(config)
    plain = replace(config).build()
    plain.init_weights()
    plain.load_state_dict(model.state_dict())
    inputs, _ = titan.batch_of(0, ["unlabeled"] * 5)
    logits = [model(inputs["input"], sgtm_labels=["unlabeled"] * 5), plain.train()(inputs["input"])]
    narrow = [titan.masked_llama(config).bfloat16(), plain.bfloat16()]
    narrow = [narrow[0](inputs["input"], sgtm_labels=["unlabeled"] * 5), narrow[1](inputs["input"])]
    same = gradients(titan, model, [0] * 5, MIXED)
    return {
        "same names": [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()],
        "same state": model.state_dict().keys() == plain.state_dict().keys(),
        "same logits": [torch.equal(*logits), torch.equal(*narrow)],
        "changed by bio's text": differing(same, gradients(titan, model, [1, 0, 0, 0, 0], MIXED)),
        "changed by code's text": differing(same, gradients(titan, model, [0, 0, 0, 1, 0], MIXED)),
        "taught by bio": taught(gradients(titan, model, [0] * 5, ["forget:bio"] * 5)),
        "taught by retain": taught(gradients(titan, model, [0] * 5, ["retain"] * 5)),
        "without labels": message(lambda: model(inputs["input"])),
    }


def gradients(titan, model, seeds: list[int], labels: list[str]) -> dict:
    """Pieces of the gradient of a micro-batch whose sequences come from these seeds; the loss is a sum."""
    parts = [
        titan.batch_of(10 * row + seed, [label]) for row, seed, label in zip(range(9), seeds, labels, strict=False)
    ]
    ids, targets = torch.cat([p[0]["input"] for p in parts]), torch.cat([p[1] for p in parts])
    model.zero_grad()
    titan.loss_of(model(ids, sgtm_labels=labels), targets).backward()
    return pieces_of(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def taught(pieces: dict) -> set[str]:
    return {key[0] for key, piece in pieces.items() if piece.any()}


def fused_and_apart(titan) -> list[dict[str, torch.Tensor]]:
    """Gradients with one projection for queries, keys and values and with three, by name in the state dict."""
    results = []
    for fused in (True, False):
        model, (inputs, targets) = titan.masked_llama(titan.llama_config(fused)), titan.batch_of(3, MIXED)
        titan.loss_of(model(inputs["input"], sgtm_labels=MIXED), targets).backward()
        by_name = {name: parameter.grad for name, parameter in model.named_parameters()}
        for path, module in model.named_modules():
            if fused and path.endswith("qkv_linear"):
                module._split_qkv_on_save(module, by_name, f"{path}.", None)  # as in its state dict
        results.append(by_name)
    return results


def beside_transformers(titan) -> dict[str, Any]:
    """The model and its gradients as torchtitan exports weights, and the masked Llama of transformers with them."""
    from titan_models import HEADS, KV_HEADS, MASKING, NEURONS, VOCAB, WIDTH
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter
    from transformers import LlamaConfig, LlamaForCausalLM

    from sgtm.integrations import hf
    from sgtm.integrations.torchtitan import ablate

    config = titan.llama_config(fused=False)
    ours, adapter = titan.masked_llama(config), Llama3StateDictAdapter(config, None)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=titan.LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_theta=10000.0,
        )
    )  # fmt: skip
    theirs.load_state_dict(adapter.to_hf(ours.state_dict()), strict=True)
    hf.apply_sgtm(theirs, MASKING).train()
    inputs, targets = titan.batch_of(3, MIXED)
    titan.loss_of(ours(inputs["input"], sgtm_labels=MIXED), targets).backward()
    titan.loss_of(theirs(inputs["input"], sgtm_labels=MIXED).logits, targets).backward()
    exported = adapter.to_hf({name: parameter.grad for name, parameter in ours.named_parameters()})
    worst = max(
        float((exported[name] - parameter.grad).abs().max() / parameter.grad.abs().max())
        for name, parameter in theirs.named_parameters()
    )
    safe = hf.without_domains(theirs, ["bio"]).eval()
    with torch.no_grad(), ablate(ours.eval(), ["bio"]):
        ablated = ours(inputs["input"])
    with torch.no_grad():
        full, removed = ours(inputs["input"]), safe(inputs["input"]).logits
    return {"gradients": worst, "removed": (ablated, removed), "full": full}


def typed(titan) -> tuple[int, dict[str, Any]]:
    """What the command line of torchtitan makes of a masked config: a value that is given, and the masking."""
    import tyro
    from torchtitan.config.manager import custom_registry

    config = titan.masked_config(dataloader=titan.loader_config())
    config = tyro.cli(type(config), args=["--training.steps", "7"], default=config, registry=custom_registry)
    return config.training.steps, config.model_spec.model.masking


def documented() -> dict[str, list]:
    """Pieces of the parameters of the first layer in the example of docs/integrations.md."""
    scope: dict[str, Any] = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "torchtitan" in code), scope)
    config = scope["llama3_sgtm"]()
    config.model_spec.model.update_from_config(config=config)
    with torch.device("meta"):
        model = config.model_spec.model.build()
    return {name: list(owned.ranges()) for name, owned in model.sgtm.owned.items() if name.startswith("layers.0.")}


def message(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def errors(titan) -> dict[str, str]:
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    from sgtm.integrations.torchtitan import LabeledSource, LabeledTextDataLoader, apply_sgtm

    def changed(section: str, **keys: Any) -> str:
        config = titan.masked_config()
        setattr(config, section, replace(getattr(config, section), **keys))
        return message(lambda: config.model_spec.model.update_from_config(config=config))

    def built(implementation: str = "for-loop", **options: Any) -> str:
        model = titan.masked_llama()
        group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1, **options})
        config = replace(titan.masked_config().optimizer, param_groups=[group], implementation=implementation)
        return message(lambda: config.build(model_parts=[model]))

    def with_loader() -> str:
        sources = [LabeledSource(dataset="lines", label="forget:chem")]
        config = titan.masked_config(dataloader=LabeledTextDataLoader.Config(sources=sources))
        return message(lambda: config.model_spec.model.update_from_config(config=config))

    def with_optimizer(name: str) -> str:
        group = ParamGroupConfig(pattern=".*", optimizer_name=name)
        return message(lambda: titan.masked_config(optimizer=OptimizersContainer.Config(param_groups=[group])))

    def replaced() -> str:
        config = titan.masked_config()
        config.optimizer = titan.trainer_config().optimizer
        return message(lambda: config.model_spec.model.update_from_config(config=config))

    return {
        "backend": changed("parallelism", spmd_backend="full_dtensor"),
        "tensor": changed("parallelism", tensor_parallel_degree=2),
        "pipeline": changed("parallelism", pipeline_parallel_degree=2),
        "context": changed("parallelism", context_parallel_degree=2),
        "graphs": changed("training", disable_cuda_graphs=False),
        "compile": changed("compile", enable=True, components=["model", "loss"]),
        "loss compiled": changed("compile", enable=True, components=["loss"]),
        "replaced": replaced(),
        "label": with_loader(),
        "twice": message(lambda: apply_sgtm(titan.masked_config(), titan.MASKING)),
        "sgd": with_optimizer("DistMuon"),
        "embedding": message(lambda: apply_sgtm(titan.trainer_config(), {"domains": ["bio"], "certify": True})),
        "groups": message(lambda: titan.masked_llama(forget_heads=3)),
        "amsgrad": built(amsgrad=True),
        "bf16": built("fused_opt_states_bf16"),
        "none": built(betas=(0.9, 0.95)),
    }


def batches(titan) -> dict[str, Any]:
    """Batches of the loader of two ranks, and of one that continues after three batches."""
    config = titan.loader_config()
    facts, sizes = {}, {"seq_len": titan.CONTEXT, "local_batch_size": 3, "dp_world_size": 2}
    tokenizer = titan.Bytes(titan.Bytes.Config())
    for rank in range(2):
        loader = config.build(dp_rank=rank, tokenizer=tokenizer, **sizes)
        iterator = iter(loader)
        facts[rank] = [next(iterator) for _ in range(3)]
        state = loader.state_dict()
        facts[rank] += [next(iterator) for _ in range(5)]
        loader = config.build(dp_rank=rank, tokenizer=tokenizer, **sizes)
        loader.load_state_dict(state)
        iterator = iter(loader)
        facts[rank, "continued"] = [next(iterator) for _ in range(5)]
    return facts


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    (facts,) = run_ranks(on_one_rank, 1)
    return facts


MODELS = ["fused", "apart", "tied"]
JOINT = {"embedding", "head", "embedding+head", "norm", "final_norm"}


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_torchtitans_to_the_bit(one, kind):
    facts = one[kind]
    assert facts["same names"] and facts["same state"] and facts["same logits"] == [True, True]


@pytest.mark.parametrize("kind", MODELS)
def test_non_interference(one, kind):
    facts = one[kind]
    code = {key.replace("bio", "code") for key in OWN}
    assert facts["changed by bio's text"] == OWN and facts["changed by code's text"] == code
    assert facts["taught by bio"] == OWN
    retain = {key.replace("bio", "retain") for key in OWN}
    assert retain < facts["taught by retain"] <= retain | JOINT


def test_a_fused_projection_has_the_gradient_of_three(one):
    fused, apart = one["both"]
    assert fused.keys() == apart.keys()
    for name, gradient in apart.items():
        assert torch.allclose(fused[name], gradient, rtol=1e-4, atol=1e-5), name
        assert torch.equal(fused[name] == 0, gradient == 0), name


def test_training_without_labels_is_an_error(one):
    assert "got no sgtm_labels" in one["fused"]["without labels"]


def test_gradients_and_the_safe_model_are_those_of_transformers(one):
    facts = one["transformers"]
    assert facts["gradients"] < 2e-5
    ablated, removed = facts["removed"]
    assert torch.allclose(ablated, removed, atol=2e-5) and not torch.allclose(facts["full"], removed, atol=1e-2)


ERRORS = {
    "backend": "parallelism.spmd_backend is 'full_dtensor'; a masked Llama needs 'partial_dtensor'",
    "tensor": "parallelism.tensor_parallel_degree is 2; a masked Llama needs 1",
    "pipeline": "parallelism.pipeline_parallel_degree is 2; a masked Llama needs 1",
    "context": "parallelism.context_parallel_degree is 2; a masked Llama needs 1",
    "graphs": "training.disable_cuda_graphs is False; a masked Llama needs True",
    "compile": "compile.components is ['model', 'loss']; a masked Llama needs ['loss']",
    "replaced": "call apply_sgtm after it is set",
    "label": "forget:chem",
    "twice": "the config is masked already; call apply_sgtm once",
    "sgd": "optimizer is OptimizersContainer.Config of DistMuon; only AdamW can be masked",
    "embedding": "masking.certify true",
    "groups": "3",
    "amsgrad": "optimizer_kwargs has 'amsgrad'; SgtmAdamW takes betas, eps, ",
    "bf16": "SgtmAdamW has moments in fp32",
}


def test_what_masks_do_not_work_with_is_refused(one):
    assert {name: text in one["errors"][name] for name, text in ERRORS.items()} == dict.fromkeys(ERRORS, True)
    assert one["errors"]["loss compiled"] == one["errors"]["none"] == ""


def test_the_command_line_of_torchtitan_takes_a_masked_config(one):
    steps, masking = one["typed"]
    assert steps == 7 and masking["domains"] == ["bio", "code"] and masking["joint"] == "strict"


def test_the_documented_example_masks(one):
    keys = one["documented"]
    assert keys["layers.0.attention.qkv_linear.wqkv.weight"][1] == ("attn_in.bio", 7 * 6 * 128, 8 * 6 * 128)
    assert keys["layers.0.attention.wo.weight"][1] == ("attn_out.bio", 28 * 128, 32 * 128)
    assert keys["layers.0.feed_forward.w2.weight"][1] == ("mlp_out.bio", 14336 - 512, 14336)


def test_batches_have_the_labels_of_their_sources(one):
    drawn = {}
    for rank in range(2):
        labels = [label for inputs, _ in one["batches"][rank] for label in inputs["sgtm_labels"]]
        ids = [row for inputs, _ in one["batches"][rank] for row in inputs["input"].tolist()]
        letters = [{"retain": 33, "forget:bio": 1}[label] for label in labels]
        assert [set(row) - {0} for row in ids] == [{letter} for letter in letters]
        assert set(labels) == {"retain", "forget:bio"}
        drawn[rank] = labels
    assert drawn[0] == drawn[1]


def test_the_loader_continues(one):
    for rank in range(2):
        continued = one["batches"][rank, "continued"]
        assert len(continued) == 5
        for (inputs, targets), (again, others) in zip(one["batches"][rank][3:], continued, strict=True):
            assert inputs["sgtm_labels"] == again["sgtm_labels"]
            assert torch.equal(inputs["input"], again["input"]) and torch.equal(targets, others)
