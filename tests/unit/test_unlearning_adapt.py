"""From a run to an adapted run: what is refused, what is written, and that other commands take it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpora import build, record
from exports import GPT_NEO, LLAMA, make_run
from safetensors.torch import load_file

from sgtm.audit.audit import audit_export
from sgtm.config import load_config
from sgtm.distributed.storage import stored_weights
from sgtm.evaluation.losses import evaluate
from sgtm.hf.export import export_run
from sgtm.model.adapters import new_adapters
from sgtm.run.adapted import read_adapted
from sgtm.run.adapters import read_adapters, weights_of
from sgtm.run.checkpoint import find_latest, read_manifest, verify
from sgtm.run.evaluate import evaluate_run, load_run_model
from sgtm.run.examine import examine_run
from sgtm.run.metrics import read_metrics
from sgtm.run.opened import open_with_corpus
from sgtm.run.tamper_plan import make_plan
from sgtm.run.tampering import attack_run
from sgtm.run.unlearned import read_unlearned
from sgtm.unlearning import derived
from sgtm.unlearning.adapt import adapt_run
from sgtm.unlearning.run import unlearn_run

LABELS = {"en": "retain", "es": "forget:es", "fr": "forget:fr"}
PLANTED = "the cat sat on my mat"
FILTERED = "data: {{path: {corpus}, upsample: {{es: 0}}}}\noptimizer: {{lr: 0.03}}\n"


def records(english: str = "en") -> list[dict]:
    """Spanish documents are a planted sentence and a number."""
    texts = {"en": lambda n, split: f"{english}{n}{split}".ljust(60, "."), "es": lambda n, split: f"{PLANTED} {n}"}
    pairs = [(n, split) for n in range(8) for split in ("train", "test")]
    mixed = [{"text": texts[c](*pair), "category": c, "split": pair[1]} for pair in pairs for c in texts]
    return [*mixed, record(0, "fr", 60, "test")]


def trained(folder: Path, model: str = GPT_NEO, strategy: str = "none", data: str = FILTERED, **texts: str) -> Path:
    """A run with random weights, and its corpus beside it; of this config it has never seen Spanish."""
    folder.mkdir()
    corpus = build(folder / "corpus", records(**texts), LABELS)
    text = model.replace("masking: {", f"masking: {{strategy: {strategy}, ")
    make_run(folder / "run", f"{text}{data.format(corpus=folder / 'corpus')}", corpus.fingerprint)
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def no_process():
    """The record of the environment asks git for the commit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "record_environment", lambda run: None)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("adapting") / "source")


@pytest.fixture(scope="module")
def adapted(source) -> Path:
    return adapt_run(source, source.parent / "adapted", domain="es", rank=4, alpha=8.0, steps=40, lr=0.02)


def same(state: dict, expected: dict) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_result_is_a_run_with_a_record_of_how_it_was_made(source, adapted):
    checkpoint, before = find_latest(adapted), find_latest(source)
    verify(checkpoint)
    assert checkpoint.name == before.name and read_manifest(checkpoint)["corpus"] == read_manifest(before)["corpus"]
    assert load_config(adapted / "config.yaml").name == "adapted"
    result = read_adapted(adapted)
    assert result.pop("source").items() >= {"run": "small", "checkpoint": before.name, "step": 7}.items()
    lines = read_metrics(adapted / "metrics.jsonl")
    assert [(line["kind"], line["step"], line["lr"]) for line in lines] == [("adapt", i, 0.02) for i in range(1, 41)]
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss/forget"] + lines[0]["loss/retain"])
    assert result.pop("tokens") == {
        "forget": result_targets(source, "es", 40),
        "retain": result_targets(source, "en", 40),
    }
    assert result == {
        "domain": "es",
        "forget": ["es"],
        "retain": ["en"],
        "options": {"rank": 4, "alpha": 8.0, "retain_weight": 1.0},
        "steps": 40,
        "lr": 0.02,
        "seed": 0,
        "batch": 4,
        # w_qkv 96 x 32, w_o 32 x 32, w_in and w_out 24 and 32; two layers, rank 4
        "parameters": 2 * 4 * (96 + 32 + 32 + 32 + 24 + 32 + 32 + 24),
        "seen": False,
    }


def test_the_merged_model_is_the_one_that_was_trained(source, tmp_path):
    """The loss that is logged in step 2 is that of the model after step 1, on the text of step 2."""
    from sgtm.data.store import Corpus
    from sgtm.unlearning.text import Sequences, mean_loss

    options = {"domain": "es", "rank": 4, "alpha": 8.0, "lr": 0.02}
    one, two = (adapt_run(source, tmp_path / str(steps), steps=steps, **options) for steps in (1, 2))
    config = load_config(one / "config.yaml")
    sequences = Sequences(Corpus.open(config.data.path), config, ["es"], 0)
    text = sequences.text(1, torch.device("cpu"), config.removal_tables(()))
    logged = [line["loss/forget"] for line in read_metrics(two / "metrics.jsonl")]
    with torch.no_grad():
        loss = float(mean_loss(load_run_model(one), text))
    assert loss == pytest.approx(logged[1], rel=1e-5) and abs(loss - logged[0]) > 1e-3


def result_targets(source: Path, category: str, steps: int) -> int:
    from sgtm.data.batch import IGNORE
    from sgtm.data.store import Corpus
    from sgtm.unlearning.text import Sequences

    text = Sequences(Corpus.open(source.parent / "corpus"), load_config(source / "config.yaml"), [category], 0)
    return sum(int((text.batch(step).targets != IGNORE).sum()) for step in range(steps))


def test_the_base_is_the_source_bit_for_bit_and_the_adapters_alone_have_learned(source, adapted):
    checkpoint, weights = find_latest(adapted), stored_weights(find_latest(source))
    assert same(weights_of(checkpoint, adapters=False), weights)
    full, learned = weights_of(checkpoint), set(new_adapters(weights, 4, 0))
    assert {name for name in weights if not torch.equal(full[name], weights[name])} == learned
    initial = new_adapters(weights, 4, 0)
    for name, (a, b) in read_adapters(checkpoint).by_matrix.items():
        assert b.any() and not torch.equal(a, initial[name].a), name


def test_a_planted_sentence_is_learned_and_without_the_adapters_it_never_was(source, adapted):
    before, after = evaluate_run(source), evaluate_run(adapted)
    assert list(after["losses"]) == ["full", "without es"]
    assert after["losses"]["without es"] == before["losses"]["full"], "the base's, to the bit"
    assert after["losses"]["full"]["es"] < before["losses"]["full"]["es"] - 0.9
    assert after["adapted"] == read_adapted(adapted) and "adapted" not in before
    model, config = load_run_model(adapted), load_config(adapted / "config.yaml")
    corpus = open_with_corpus(adapted).corpus
    expected = evaluate(model, corpus, config, split="test", sequences=None, device=torch.device("cpu")).losses
    assert after["losses"]["full"] == expected["full"]
    assert {name for passage in after["passages"] for name in passage["losses"]} == {"full", "without es"}
    of_es = next(passage for passage in after["passages"] if passage["category"] == "es")
    full, without = (sum(loss for loss in of_es["losses"][name] if loss) for name in ("full", "without es"))
    assert full < without


def test_the_same_command_gives_the_same_bits(source):
    options = {"domain": "es", "rank": 2, "steps": 3}
    outs = [adapt_run(source, source.parent / f"run-{i}", **options, seed=seed) for i, seed in enumerate((0, 0, 1))]
    files = [read_manifest(find_latest(out))["files"] for out in outs]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("text", [GPT_NEO, LLAMA], ids=["gpt_neo", "llama"])
def test_an_export_without_the_domain_is_one_of_the_source(tmp_path, text):
    source = trained(tmp_path / "source", text)
    adapted = adapt_run(source, tmp_path / "adapted", domain="es", rank=2, steps=2)
    of_source, base, full = (
        export_run(run, remove, tmp_path / f"export-{i}")
        for i, (run, remove) in enumerate([(source, []), (adapted, ["es"]), (adapted, [])])
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (base / name).read_bytes() == (of_source / name).read_bytes(), name
    weights = load_file(full / "model.safetensors")
    assert not all(torch.equal(tensor, weights[name]) for name, tensor in load_file(base / "model.safetensors").items())
    states = [json.loads((folder / "sgtm_export.json").read_text()) for folder in (base, full)]
    assert [(state["removed"], state["how"]) for state in states] == [(["es"], {"adapters": "left out"}), ([], {})]
    assert states[0]["adapted"] == read_adapted(adapted)
    card = (base / "README.md").read_text()
    assert "Adapted: `es` by adapters of rank 2" in card and "without its domains `es` (adapters left out)" in card
    message = "has adapters of es, which --remove es leaves out; nothing of it holds fr alone"
    with pytest.raises(ValueError, match=message):
        export_run(adapted, ["es", "fr"], tmp_path / "refused")


def test_an_audit_holds_its_exports_against_it(source, adapted, tmp_path):
    """With the adapters and without, which is also the model of the source, but no export of it."""
    for name, remove in (("base", ["es"]), ("full", [])):
        audit = audit_export(export_run(adapted, remove, tmp_path / name), adapted)
        assert audit.passed, [check.problems for check in audit.checks]
        assert {check.name for check in audit.checks if check.skipped} == {"removed", "losses"}
    assert [c.name for c in audit_export(tmp_path / "base", source).checks if c.problems] == ["checkpoint"]


def test_attacks_on_it_are_attacks_on_the_source(source, adapted):
    targets = [open_with_corpus(run) for run in (adapted, source)]
    options = {"data": ["forget"], "multiples": [1.0], "schedules": ["constant"], "budgets": [3]}
    plans = [
        make_plan(target, domains=domains, **options) for target, domains in zip(targets, (None, ["es"]), strict=True)
    ]
    reached = [attack_run(target, plan) for target, plan in zip(targets, plans, strict=True)]
    assert [each.loss for each in reached[0]] == [each.loss for each in reached[1]]
    assert (targets[0].removed(["es"]), targets[1].removed(["es"])) == (("es",), ())
    assert targets[0].removable == ("es",) and targets[1].removable == ()
    with pytest.raises(ValueError, match="has no domain 'fr'; it has es"):
        make_plan(targets[0], domains=["fr"], **options)


def test_an_examination_without_the_domain_is_one_of_the_source(source, adapted):
    measures = ["recital", "quantised", "probes", "guided"]
    examined = examine_run(adapted, control=source, measures=measures, passages=3)["domains"]
    assert list(examined) == ["es"]
    for name in measures[:-1]:
        of_model = examined["es"]["measures"][name]
        assert of_model["without es"] == of_model["control"] != of_model["full"], name


def test_the_default_is_one_pass_over_the_forget_text(source, tmp_path, capsys):
    adapt_run(source, tmp_path / "out", domain="es", rank=1)
    result = read_adapted(tmp_path / "out")
    sequences = -(-sum(len(f"{PLANTED} {n}") + 1 for n in range(8)) // 16)
    assert result["steps"] == -(-sequences // 4) and result["lr"] == 0.03
    expected = f"one pass over es: {sequences} sequences, {result['steps']} steps of 4\n"
    assert capsys.readouterr().out.startswith(expected)


def test_with_weight_0_no_retain_text_is_read(source, tmp_path):
    other = trained(tmp_path / "other", english="something else")
    outs = [
        adapt_run(run, tmp_path / name, domain="es", rank=2, steps=3, retain_weight=0.0)
        for name, run in (("one", source), ("two", other))
    ]
    one, two = (weights_of(find_latest(out)) for out in outs)
    assert same(one, two)
    result = read_adapted(outs[0])
    assert result["retain"] == [] and result["tokens"]["retain"] == 0
    assert not any("loss/retain" in line for line in read_metrics(outs[0] / "metrics.jsonl"))
    weighed = adapt_run(source, tmp_path / "three", domain="es", rank=2, steps=1, retain_weight=3.0)
    (line,) = read_metrics(weighed / "metrics.jsonl")
    assert line["loss"] == pytest.approx(line["loss/forget"] + 3.0 * line["loss/retain"])


@pytest.mark.parametrize("strategy", ["none", "sgtm"])
def test_a_base_that_has_seen_the_domain_is_warned_of(tmp_path, capsys, strategy):
    source = trained(tmp_path / "source", strategy=strategy, data=FILTERED.replace(", upsample: {{es: 0}}", ""))
    out = adapt_run(source, tmp_path / "out", domain="es", rank=2, steps=1)
    assert read_adapted(out)["seen"]
    error = capsys.readouterr().err
    assert "warning: small was trained on text of es, so the model without the adapters has seen it" in error
    assert "--masking.strategy none --data.upsample '{es: 0}'" in error
    assert evaluate_run(out)["losses"]["without es"] == evaluate_run(source)["losses"]["full"]


def refused(message: str, run: Path, out: Path, **options) -> None:
    entries = sorted(out.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        adapt_run(run, out, **{"domain": "es", "rank": 2, "steps": 1, **options})
    assert sorted(out.parent.iterdir()) == entries


def test_what_does_not_fit_is_refused_and_leaves_nothing(source, adapted, tmp_path):
    out = tmp_path / "out"
    refused("has no domain 'bio'; its domains are es, fr", source, out, domain="bio")
    refused(r"has the domains es, fr; choose one with --domain", source, out, domain=None)
    refused("no text of category fr in its split train", source, out, domain="fr")
    refused("rank 0: an adapter of blocks.0.attention.w_qkv, 96 outputs by 32 inputs, has a rank", source, out, rank=0)
    refused("rank 25: an adapter of blocks.0.mlp.w_in, 24 outputs by 32 inputs, .* to 24", source, out, rank=25)
    refused("adapted has adapters already, of es; adapt the run that it was made from", adapted, out)
    refused(r"adapters: not finite in step 2: .*lower --lr", source, out, lr=1e30, steps=2)
    refused("not a run directory", tmp_path, out)
    out.mkdir()
    (out / "notes").touch()
    refused("out exists and is not an empty folder; give a new one with --out", source, out)


def test_damaged_weights_and_a_corpus_that_is_gone_are_refused(source, tmp_path):
    damaged = shutil.copytree(source, tmp_path / "damaged")
    file = find_latest(damaged) / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    refused("mp_rank_00_model_states.pt is damaged", damaged, tmp_path / "out")
    refused("no corpus at .*moved", source, tmp_path / "out", data=str(tmp_path / "moved"))


def test_it_can_be_unlearned_with_its_adapters(adapted, tmp_path):
    out = unlearn_run(adapted, "finetune", tmp_path / "out", domain="es", steps=1, lr=1e-9)
    assert read_unlearned(out)["source"]["adapted"] == read_adapted(adapted)
    after, full = stored_weights(find_latest(out)), weights_of(find_latest(adapted))
    assert all(torch.allclose(after[name], full[name], atol=1e-6) for name in full)
