"""Preventative steering from the base run to the evaluation: direction, export, steered run, its four losses.

With strength 0 the run is the unsteered one, resumed it is the uninterrupted one, and its export adds nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from same_run import metrics

from sgtm.config import load_config
from sgtm.distributed.storage import stored_weights
from sgtm.model.direction import IN_RUN, read_direction, write_direction
from sgtm.run.checkpoint import find_latest, read_manifest

COMMON = [
    "--masking.strategy=none",
    "--train.steps=6",
    "--train.tokens_per_step=512",
    "--train.log_every=2",
    "--train.checkpoint_every=3",
]
STRENGTHS = {"plain": None, "zero": 0.0, "steered": 8.0, "stopped": 8.0}


def train_all(runs: str) -> None:
    """`base`, its direction and export, and runs that start from it: with the strengths above, one of them stopped."""
    from sgtm.hf.export import export_run
    from sgtm.training import loop
    from sgtm.unlearning.mean_difference import direction_of_text

    def train(name: str, *options: str, resume: bool = False) -> Path:
        config = load_config("debug", [*COMMON, f"--runs={runs}", f"--name={name}", *options])
        return loop.train(config, resume=resume)

    base, export, file = train("base"), Path(runs, "export"), Path(runs, "es.safetensors")
    direction_of_text(base, file, domain="es", layer=0, sequences=16)
    export_run(base, [], export)

    class Stop(loop.StopSignal):
        def anywhere(self, engine) -> bool:
            return engine.module.steering is not None and stopping

    loop.StopSignal = Stop
    for name, strength in STRENGTHS.items():
        steering = [] if strength is None else [f"--steering.direction={file}", f"--steering.strength={strength}"]
        options, stopping = [f"--train.init_from={export}", *steering], name == "stopped"
        train(name, *options)
        if stopping:
            assert find_latest(Path(runs, name)).name == "step_00000001"
            stopping, changed = False, Path(runs, "changed.safetensors")
            write_direction(changed, read_direction(file).vectors * 2, read_direction(file).record)
            with pytest.raises(ValueError, match=r"steering.direction: a file with SHA-256 .*changed.safetensors with"):
                train(name, *options, f"--steering.direction={changed}", resume=True)
            changed.unlink()
            with pytest.raises(ValueError, match=r"steering.direction: .*changed.safetensors: No such file"):
                train(name, *options, f"--steering.direction={changed}", resume=True)
            train(name, *options, resume=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run_ranks(train_all, 1, str(runs))
    return runs


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(stored_weights(find_latest(run)))


def files(run: Path) -> dict:
    """Size and hash of each file of the newest checkpoint."""
    return read_manifest(find_latest(run))["files"]


def without_projections(run: Path) -> list[dict]:
    lines = metrics(run)
    for line in lines:
        for parts in line.get("norms", {}).values():
            parts.pop("projection", None)
    return lines


def test_with_strength_0_the_run_is_the_unsteered_one(runs: Path):
    plain, zero, steered = (weights(runs / name) for name in ("plain", "zero", "steered"))
    assert all(torch.equal(plain[name], zero[name]) for name in plain)
    assert any(not torch.equal(plain[name], steered[name]) for name in plain)
    assert files(runs / "plain") == files(runs / "zero") != files(runs / "steered")
    without = [
        {k: v for k, v in line.items() if k not in ("losses", "errors")} for line in without_projections(runs / "zero")
    ]
    steps = [line for line in without if line["kind"] == "step"]
    assert steps == [line for line in metrics(runs / "plain") if line["kind"] == "step"]


def test_a_resumed_run_is_the_uninterrupted_one(runs: Path):
    steered, resumed = (weights(runs / name) for name in ("steered", "stopped"))
    assert all(torch.equal(steered[name], resumed[name]) for name in steered)
    assert files(runs / "steered") == files(runs / "stopped")
    assert metrics(runs / "steered") == metrics(runs / "stopped")


def test_the_log_has_projections_by_label_and_the_checkpoint_the_hash(runs: Path):
    direction = read_direction(runs / "es.safetensors")
    for name in ("zero", "steered"):
        lines = [line for line in metrics(runs / name) if line["kind"] == "step"]
        assert len(lines) == 3 and all(isinstance(line["norms"]["forget:es"]["projection"], float) for line in lines)
        assert read_manifest(find_latest(runs / name))["direction"] == direction.sha256
        assert (runs / name / IN_RUN).read_bytes() == (runs / "es.safetensors").read_bytes()
    assert not any(
        "projection" in parts for line in metrics(runs / "plain") for parts in line.get("norms", {}).values()
    )
    assert read_manifest(find_latest(runs / "plain"))["direction"] is None


def evaluated(run: Path, **options) -> dict:
    from sgtm.run.evaluate import evaluate_run

    return evaluate_run(run, sequences=8, **options)


def test_the_evaluation_has_four_losses_and_removes_no_group(runs: Path):
    summary = evaluated(runs / "steered")
    assert set(summary["losses"]) == {"full", "without es"}
    assert summary["losses"]["full"] != summary["losses"]["without es"]
    assert summary["steering"]["strength"] == 8.0 and summary["steering"]["domain"] == "es"
    projections = [summary["output_norms"][name]["es"]["projection"] for name in summary["losses"]]
    assert projections[0] == projections[1], "before anything is added"
    none, opposite = (evaluated(runs / "steered", steer=steer) for steer in (0.0, -8.0))
    assert none["losses"] == dict.fromkeys(("full", "without es"), summary["losses"]["without es"])
    assert none["steering"]["strength"] == 0.0
    assert opposite["losses"]["without es"] == summary["losses"]["without es"]
    assert opposite["losses"]["full"] != summary["losses"]["full"]
    with pytest.raises(ValueError, match=r"--steer: .*plain was trained without steering\.direction: there is nothing"):
        evaluated(runs / "plain", steer=1.0)


def test_the_export_is_the_plain_model_and_has_nothing_to_remove(runs: Path):
    from transformers import AutoModelForCausalLM

    from sgtm.hf.export import export_run
    from sgtm.run.evaluate import load_run_model
    from sgtm_kernels.plan import MaskPlan

    theirs = AutoModelForCausalLM.from_pretrained(export_run(runs / "steered", [], runs / "of-steered"))
    model, config = load_run_model(runs / "steered"), load_config(runs / "steered/config.yaml")
    ids = torch.arange(64)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        plain, full = (model.logits(ids, MaskPlan.uniform(config.removal_tables(w), 0, 1, 64)) for w in (["es"], []))
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="was trained without masks: no group of it holds es"):
        export_run(runs / "steered", ["es"], runs / "without")


def test_another_file_in_the_run_directory_is_refused(runs: Path):
    file = runs / "zero" / IN_RUN
    content, direction = file.read_bytes(), read_direction(file)
    write_direction(file, direction.vectors * 2, direction.record)
    with pytest.raises(ValueError, match=r"direction.safetensors is another file than the run was trained with; rest"):
        evaluated(runs / "zero")
    file.unlink()
    with pytest.raises(ValueError, match=r"steering.direction: .*direction.safetensors: No such file"):
        evaluated(runs / "zero")
    file.write_bytes(content)


def test_an_unlearned_run_adds_nothing_and_starts_from_the_plain_model(runs: Path):
    from sgtm.data.open import open_corpus
    from sgtm.run.evaluate import load_run_model
    from sgtm.unlearning.run import unlearn_run
    from sgtm.unlearning.text import Sequences, mean_loss

    out = unlearn_run(runs / "steered", "gradient_ascent", runs / "unlearned", steps=1)
    assert load_config(out / "config.yaml").steering.direction is None
    model, config = load_run_model(runs / "steered"), load_config(runs / "steered/config.yaml")
    corpus, losses = open_corpus(config), []
    text = Sequences(corpus, config, ["es"], 0).text(0, torch.device("cpu"), config.removal_tables(()))
    for steering in (model.steering, None):
        model.steering = steering
        losses.append(float(mean_loss(model, text).detach()))
    assert json.loads((out / "metrics.jsonl").read_text())["loss/forget"] == losses[1] != losses[0]


def test_rounded_weights_without_the_domain_keep_its_group(runs: Path):
    from sgtm.data.open import open_corpus
    from sgtm.evaluation.quantisation import quantised
    from sgtm.evaluation.subject import Subject
    from sgtm.run.evaluate import load_run_model
    from sgtm.run.examine import Question, in_few_bits

    model, config = load_run_model(runs / "steered"), load_config(runs / "steered/config.yaml")
    subject = Subject(model, open_corpus(config), config, ("es",))
    losses = in_few_bits(subject, Question(("es",), ("en",), "test", 2, ()))
    for bits, by_category in losses.items():
        rough = model if bits == "unrounded" else quantised(model, int(bits))
        expected = Subject(rough, subject.corpus, config, ("es",)).scores("test", "es", 2).losses
        assert by_category["es"]["value"] == pytest.approx(float(expected.double().mean()), rel=1e-12)
