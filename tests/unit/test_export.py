"""The exported folder: it loads without our code, computes what our model does, and what was removed is not in it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exports import GPT_NEO, LLAMA, MIXTRAL, SOME_LAYERS, byte_corpus, make_run
from safetensors import safe_open
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgtm.config import Config, load_config
from sgtm.data.open import open_corpus
from sgtm.data.tokenizer import EOS, train_bpe
from sgtm.hf import export
from sgtm.hf.card import RECORD
from sgtm.hf.export import CARD, CONFIG, export_run
from sgtm.masking.strategy import removal_tables
from sgtm.model.transformer import Transformer
from sgtm.run.checkpoint import find_latest, read_manifest, write_manifest
from sgtm.run.unlearned import write_unlearned
from sgtm_kernels.plan import MaskPlan


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """A tokenizer of 257 tokens in the place of a corpus, and one thread."""
    torch.set_num_threads(1)
    monkeypatch.setattr(export, "open_corpus", lambda config, verify, write: byte_corpus())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def values(weights: dict[str, torch.Tensor]) -> set[float]:
    return {value for tensor in weights.values() for value in tensor.flatten().tolist()}


def owned(model: Transformer, group: str) -> set[float]:
    """Every weight in the rows that a group owns."""
    weights: set[float] = set()
    for name, parameter in model.named_parameters():
        rows = model.parameter_rows()[name]
        for key, start, end in zip(rows.keys, rows.bounds[:-1], rows.bounds[1:], strict=True):
            if key.endswith(f".{group}"):
                weights |= set(parameter[start:end].detach().flatten().tolist())
    return weights


@pytest.mark.parametrize("text", [GPT_NEO, LLAMA, SOME_LAYERS], ids=["gpt_neo", "llama", "some-layers"])
@pytest.mark.parametrize("remove", [[], ["es"], ["fr", "es"]], ids=["full", "es", "both"])
def test_export_loads_computes_the_same_and_lacks_what_was_removed(tmp_path, text, remove):
    model = make_run(tmp_path / "run", text)
    out = export_run(tmp_path / "run", remove, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    ids = torch.randint(257, (2, 16))
    plan = MaskPlan.uniform(removal_tables(load_config(str(tmp_path / "run/config.yaml")).space, remove), 0, 2, 16)
    with torch.no_grad():
        ours, theirs = model.logits(ids, plan), loaded(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=2e-5, atol=2e-5 * ours.abs().max().item())

    written = values(tensors(out))
    for group in ("es", "fr"):
        weights = owned(model, group)
        assert len(weights) > 500
        assert weights.isdisjoint(written) if group in remove else weights <= written
    assert owned(model, "retain") <= written


def test_removed_units_are_physically_gone_or_exactly_zero(tmp_path):
    """GPT-Neo: 3 of 24 neurons gone, head 0 zero. Llama: head 0 gone too. In one layer of two: all of it zero."""
    shapes = {}
    for name, text in {"gpt_neo": GPT_NEO, "llama": LLAMA, "some": SOME_LAYERS}.items():
        make_run(tmp_path / name, text)
        out = export_run(tmp_path / name, ["es"], tmp_path / f"{name}-out")
        shapes[name] = tensors(out), json.loads((out / "sgtm_export.json").read_text())

    weights, record = shapes["gpt_neo"]
    assert weights["transformer.h.1.mlp.c_fc.weight"].shape == (21, 32)
    assert weights["transformer.h.1.mlp.c_fc.bias"].shape == (21,)
    for part in ("q", "k", "v"):
        projection = weights[f"transformer.h.1.attn.attention.{part}_proj.weight"]
        assert projection.shape == (32, 32) and not projection[:8].any() and projection[8:].all()
    w_o = weights["transformer.h.1.attn.attention.out_proj.weight"]
    assert not w_o[:, :8].any() and w_o[:, 8:].all()
    assert record["how"] == {"heads": "zeroed", "neurons": "physically removed"}

    weights, record = shapes["llama"]
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (24, 32)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (32, 21)
    assert record["how"] == {"heads": "physically removed", "neurons": "physically removed"}
    assert record["architecture"] == "mistral"  # LlamaConfig refuses 3 heads of width 32

    weights, record = shapes["some"]
    assert weights["model.layers.0.mlp.gate_proj.weight"].all()
    gate = weights["model.layers.1.mlp.gate_proj.weight"]
    assert [n for n in range(24) if not gate[n].any()] == [1, 8, 20]
    assert record["how"] == {"heads": "zeroed", "neurons": "zeroed"}


def test_only_what_a_removed_domain_owns_is_said_to_be_removed(tmp_path):
    text = MIXTRAL.replace("forget_heads: {es: [0], fr: [2]}", "forget_heads: {es: 0, fr: 1}")
    make_run(tmp_path / "run", text)
    experts, heads = {"experts": "physically removed"}, {"heads": "physically removed"}
    for remove, how in (([], {}), (["es"], experts), (["fr"], heads | experts)):
        folder = export_run(tmp_path / "run", remove, tmp_path / "-".join(["out", *remove]))
        assert json.loads((folder / RECORD).read_text())["how"] == how
        assert ("heads physically removed" in (folder / CARD).read_text()) == ("heads" in how)


def test_folder_says_what_it_is(tmp_path, capsys):
    make_run(tmp_path / "run", GPT_NEO)
    out = export_run(tmp_path / "run", ["es"], tmp_path / "deep" / "out")
    steps = load_config(tmp_path / "run" / "config.yaml").train.steps
    assert f"exported: step 7 of {steps}, without es\n" in capsys.readouterr().err
    record = json.loads((out / "sgtm_export.json").read_text())
    manifest = (tmp_path / "run/checkpoints/step_00000007/manifest.json").read_bytes()
    assert record["removed"] == ["es"]
    assert record["checkpoint"] == {
        "name": "step_00000007",
        "step": 7,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    assert record["partition"]["groups"] == ["retain", "es", "fr"]
    assert record["partition"]["kinds"][0]["head_order"] == [1, 3, 0, 2]
    assert "without its domains `es`" in (out / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == EOS and tokenizer.decode(tokenizer("año")["input_ids"]) == "año"
    model_config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    assert model_config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_record_has_size_and_hash_of_every_other_file(tmp_path):
    make_run(tmp_path / "run", LLAMA)
    out = export_run(tmp_path / "run", ["es"], tmp_path / "out", shard=10_000)
    files = json.loads((out / RECORD).read_text())["files"]
    assert sorted(files) == sorted(file.name for file in out.iterdir() if file.name != RECORD)
    assert sum(name.endswith(".safetensors") for name in files) > 2
    for name, entry in files.items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(("text", "remove"), [(GPT_NEO, []), (LLAMA, ["es"])], ids=["gpt_neo", "llama"])
def test_several_files_of_weights_are_the_one_file(tmp_path, text, remove):
    make_run(tmp_path / "run", text)
    one, several = (
        AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", remove, tmp_path / name, shard=shard))
        for name, shard in (("one", 10**9), ("several", 9_000))
    )
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 3
    state = several.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def test_bf16_rounds_the_weights_and_the_config_has_it_in_both_spellings(tmp_path):
    make_run(tmp_path / "run", LLAMA)
    whole, rounded = (export_run(tmp_path / "run", ["es"], tmp_path / dtype, dtype=dtype) for dtype in ("fp32", "bf16"))
    assert {name: tensor.bfloat16().tolist() for name, tensor in tensors(whole).items()} == {
        name: tensor.tolist() for name, tensor in tensors(rounded).items()
    }
    for folder, dtype in ((whole, "float32"), (rounded, "bfloat16")):
        written = json.loads((folder / "config.json").read_text())
        assert written["dtype"] == written["torch_dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(rounded).dtype == torch.bfloat16
    assert "weights in bf16" in (rounded / CARD).read_text()


@pytest.mark.parametrize("text", [GPT_NEO, LLAMA], ids=["gpt_neo", "llama"])
def test_zeroed_has_the_shape_of_the_full_model(tmp_path, text):
    make_run(tmp_path / "run", text)
    full, zeroed, pruned = (
        export_run(tmp_path / "run", remove, tmp_path / name, prune=prune)
        for name, remove, prune in (("full", [], True), ("zeroed", ["es"], False), ("pruned", ["es"], True))
    )
    assert (zeroed / CONFIG).read_bytes() == (full / CONFIG).read_bytes()
    assert json.loads((zeroed / RECORD).read_text())["how"] == {"heads": "zeroed", "neurons": "zeroed"}
    ids = torch.randint(257, (2, 16))
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (zeroed, pruned)]
    torch.testing.assert_close(*logits, rtol=2e-5, atol=2e-5 * logits[0].abs().max().item())


def test_an_export_at_a_strength_is_marked_as_not_safe(tmp_path, capsys):
    make_run(tmp_path / "run", LLAMA)
    out = export_run(tmp_path / "run", ["fr"], tmp_path / "out", strengths={"es": 0.25})
    printed = capsys.readouterr().err
    assert "without fr, es at strength 0.25\n" in printed and "warning: not a safe model: it holds es\n" in printed
    record = json.loads((out / RECORD).read_text())
    assert record["removed"] == ["fr"] and record["reduced"] == {"es": 0.25}
    text = (out / CARD).read_text()
    assert "**Not a safe model.** It has `es` at strength 0.25" in text
    text = (export_run(tmp_path / "run", ["fr"], tmp_path / "whole", strengths={"es": 1}) / CARD).read_text()
    assert "Not a safe model" not in text


def test_strengths_of_a_run_without_masks_are_refused(tmp_path):
    make_run(tmp_path / "run", GPT_NEO.replace("masking: {", "masking: {strategy: none, "))
    with pytest.raises(ValueError, match="run was trained without masks: no group of it holds es"):
        export_run(tmp_path / "run", [], tmp_path / "out", strengths={"es": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_losses_of_that_step_are_in_the_card(tmp_path, capsys):
    make_run(tmp_path / "run", LLAMA)
    summary = {
        "steps": 7,
        "split": "test",
        "losses": {"full": {"en": 1.25, "x": 2.5}, "without es": {"en": 1.5, "x": 8.0}},
        "errors": {"full": {"en": 0.01, "x": 0.02}, "without es": {"en": 0.03, "x": 0.04}},
        "true_labels": {"en": "retain", "x": "forget:es"},
        "measured": {"en": {"documents": 3, "tokens": 1234}, "x": {"documents": 2, "tokens": 99}},
    }
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    text = (export_run(tmp_path / "run", ["es"], tmp_path / "safe") / CARD).read_text()
    assert "| en | retain | 1,234 | 1.250 ± 0.010 | 1.500 ± 0.030 |" in text
    assert "| x | forget:es | 99 | 2.500 ± 0.020 | 8.000 ± 0.040 |" in text
    text = (export_run(tmp_path / "run", ["fr"], tmp_path / "other") / CARD).read_text()
    assert "| x | forget:es | 99 | 2.500 ± 0.020 | not measured |" in text
    half = export_run(tmp_path / "run", ["es"], tmp_path / "half", strengths={"fr": 0.5})
    assert "| en | retain | 1,234 | 1.250 ± 0.010 | not measured |" in (half / CARD).read_text()
    assert "no losses" not in capsys.readouterr().err
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"steps": 6}))
    text = (export_run(tmp_path / "run", ["es"], tmp_path / "later") / CARD).read_text()
    assert "None were measured after step 7" in text
    assert "no losses: none were measured after step 7; sgtm eval measures them" in capsys.readouterr().err


def test_the_card_is_of_these_domains_in_the_order_of_the_run(tmp_path):
    run = tmp_path / "run"
    make_run(run, LLAMA.replace("[es, fr]", "[fr, es]"))
    losses = {"full": {"en": 1.25}, "without fr,es": {"en": 1.5}, "without es": {"en": 8.0}}
    errors = {condition: {"en": 0.01} for condition in losses}
    summary = {"steps": 7, "split": "test", "losses": losses, "errors": errors, "true_labels": {}, "measured": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    checkpoint = find_latest(run)
    write_manifest(checkpoint, read_manifest(checkpoint) | {"independent_of": ["es"]})
    text = (export_run(run, ["es", "fr"], tmp_path / "safe") / CARD).read_text()
    assert "| en |  |  | 1.250 ± 0.010 | 1.500 ± 0.010 |" in text
    assert "what the documents labelled `es` said" in text and "Not certified for `fr`: " in text


def test_an_export_states_that_the_run_was_unlearned(tmp_path):
    source = {"run": "none", "checkpoint": "step_00000007", "step": 7}
    record = {"method": "npo", "options": {}, "domain": "es", "steps": 9, "lr": 0.1, "seed": 0, "source": source}
    make_run(tmp_path / "run", GPT_NEO)
    write_unlearned(tmp_path / "run", record)
    out = export_run(tmp_path / "run", [], tmp_path / "out")
    assert json.loads((out / "sgtm_export.json").read_text())["unlearned"] == record
    assert "Unlearned: `es` by `npo`, 9 steps at learning rate 0.1" in (out / "README.md").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_is_readable_for_whom_the_umask_lets(tmp_path, umask, mode):
    make_run(tmp_path / "run", LLAMA)
    before = os.umask(umask)
    try:
        out = export_run(tmp_path / "run", ["es"], tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {p.name: mode for p in out.iterdir()}


@pytest.mark.parametrize("others", [[], [EOS]], ids=["unusual", "beside-a-usual-one"])
def test_the_end_of_text_is_the_one_that_the_corpus_was_written_with(tmp_path, monkeypatch, others):
    """Its name may be any, and another token may have a usual one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens([*others, "<stop>"])
    corpus = SimpleNamespace(
        tokenizer=tokenizer, eos_id=len(others), fingerprint="of the run", path="data", token_names={}
    )
    monkeypatch.setattr(export, "open_corpus", lambda config, verify, write: corpus)
    make_run(tmp_path / "run", GPT_NEO)
    out = export_run(tmp_path / "run", [], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<stop>" and tokenizer.model_max_length == 16  # the context
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == len(others)


def test_export_writes_no_corpus(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(export, "open_corpus", open_corpus)
    make_run(tmp_path / "run", GPT_NEO + f"data: {{path: synthetic}}\nruns: {tmp_path}\n")
    export_run(tmp_path / "run", [], tmp_path / "out")
    assert "without a tokenizer: no synthetic corpus" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_corpus_that_is_gone_costs_the_tokenizer_only(tmp_path, monkeypatch, caplog):
    def gone(config: Config, verify: str, write: bool):
        raise ValueError("no corpus at data")

    monkeypatch.setattr(export, "open_corpus", gone)
    make_run(tmp_path / "run", GPT_NEO)
    with caplog.at_level(logging.WARNING):
        out = export_run(tmp_path / "run", [], tmp_path / "out")
    assert "without a tokenizer: no corpus at data" in caplog.text
    assert (out / "model.safetensors").exists() and not (out / "tokenizer.json").exists()


def test_the_tokenizer_of_other_data_is_refused(tmp_path, monkeypatch):
    other = SimpleNamespace(
        tokenizer=train_bpe([], 257), eos_id=0, fingerprint="prepared again", path="data", token_names={}
    )
    monkeypatch.setattr(export, "open_corpus", lambda config, verify, write: other)
    make_run(tmp_path / "run", GPT_NEO)
    with pytest.raises(ValueError, match=f"{tmp_path}/run was trained on another corpus than data; restore that"):
        export_run(tmp_path / "run", [], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    make_run(tmp_path / "run", GPT_NEO)
    out = tmp_path / "out"
    out.mkdir()
    export_run(tmp_path / "run", [], out)  # empty: taken
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ValueError, match="not an empty folder"):
        export_run(tmp_path / "run", ["es"], out)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_failures_leave_nothing_behind(tmp_path, monkeypatch):
    make_run(tmp_path / "run", GPT_NEO)
    with pytest.raises(ValueError, match="cannot remove 'de'; domains: es, fr"):
        export_run(tmp_path / "run", ["de"], tmp_path / "out")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_shards", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(tmp_path / "run", [], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_no_run_no_checkpoint_or_a_damaged_one_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a run directory"):
        export_run(tmp_path / "nowhere", [], tmp_path / "out")
    make_run(tmp_path / "run", GPT_NEO)
    weights = next((tmp_path / "run/checkpoints").rglob("*.pt"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt has \d+ of \d+ bytes \(truncated\)"):
        export_run(tmp_path / "run", [], tmp_path / "out")
    for file in sorted((tmp_path / "run/checkpoints").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export_run(tmp_path / "run", [], tmp_path / "out")


def test_a_checkpoint_that_is_being_written_is_not_taken(tmp_path):
    make_run(tmp_path / "run", GPT_NEO)
    checkpoints = tmp_path / "run/checkpoints"
    unfinished = checkpoints / ".tmp-step_00000009"
    unfinished.mkdir()
    (unfinished / "mp_rank_00_model_states.pt").write_bytes(b"half")
    record = json.loads((export_run(tmp_path / "run", [], tmp_path / "out") / RECORD).read_text())
    assert record["checkpoint"]["step"] == 7
    (checkpoints / "step_00000007").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"no finished checkpoint: \.tmp-step_00000009 is being written, or a run that"
    ):
        export_run(tmp_path / "run", [], tmp_path / "again")
    assert not (tmp_path / "again").exists() and (unfinished / "mp_rank_00_model_states.pt").read_bytes() == b"half"


def test_nothing_can_be_removed_from_a_run_without_masks(tmp_path):
    make_run(tmp_path / "run", GPT_NEO.replace("masking: {", "masking: {strategy: none, "))
    with pytest.raises(ValueError, match="run was trained without masks: no group of it holds es, fr"):
        export_run(tmp_path / "run", ["es", "fr"], tmp_path / "safe")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (export_run(tmp_path / "run", [], tmp_path / "whole") / "model.safetensors").exists()
