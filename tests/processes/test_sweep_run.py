"""What `sgtm sweep` refuses before it trains, how it divides the machine, what it submits, and what its table says."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
from corpora import LABELS, Records, build, mixed_records, record
from rich.console import Console

from sgtm.commands.main import main
from sgtm.config.load import save_config
from sgtm.data.prepare import prepare
from sgtm.data.rules import Rules
from sgtm.data.store import Corpus
from sgtm.run.checkpoint import write_manifest
from sgtm.sweep import progress, schedule
from sgtm.sweep.compare import open_corpora
from sgtm.sweep.figures import losses as losses_figure
from sgtm.sweep.file import read_sweep
from sgtm.sweep.run import run_sweep
from sgtm.sweep.schedule import _fits
from sgtm.sweep.state import FINISHED, state_of, steps_done
from sgtm.sweep.table import losses_of, print_table, read_rows

BASE = """
extends: debug
model: {vocab_size: 320}
data: {path: DATA}
train: {steps: 4, eval_sequences: 3}
"""
ROOT = Path(__file__).parents[2]


def no_start(*_):
    raise AssertionError("a run was started")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Folder of the corpora `data`, `more` (of train), `other` (held out) and `words` (another tokenizer)."""
    folder = tmp_path_factory.mktemp("corpora")
    records = mixed_records()
    build(folder / "data", records)
    build(folder / "more", [*records, record(1000)])
    build(folder / "other", [*records, record(1000, split="test")])
    rules = Rules.model_validate({"split": {"field": "split"}, "labels": LABELS})
    prepare([Records(tuple(records))], rules, "train", folder / "words", vocab_size=270, workers=1)
    return folder


@pytest.fixture
def sweep_file(tmp_path, corpora):
    """The file of a sweep of the base with these lines, in an empty folder of runs."""

    def write(text: str) -> Path:
        (tmp_path / "base.yaml").write_text(BASE.replace("DATA", str(corpora / "data")))
        file = tmp_path / "mine.yaml"
        file.write_text(f"base: ./base.yaml\nruns: {tmp_path / 'torch'}\n{text.replace('CORPORA', str(corpora))}\n")
        return file

    return write


BOTH = "a-s0 and b-s0 differ in "
OTHER_DATA = "{a: , b: {data.path: CORPORA/%s}}\nmay_differ: {b: [data]}"
SYNTHETIC = "{a: {data.path: synthetic, model.vocab_size: 300}, b: {data.path: synthetic}}"
REFUSED = {
    "tokens": (
        "{a: , b: {train.steps: 5}}",
        BOTH + "train.steps x train.tokens_per_step: 4 x 512 = 2,048 and 5 x 512 = 2,560; give both the same, or allow "
        "it on purpose with may_differ: {b: [tokens]}",
    ),
    "data": ("{a: , b: {data.path: CORPORA/more}}", BOTH + "data.path: "),
    "tokenizer": (OTHER_DATA % "words", BOTH + "the tokenizer of data.path: "),
    "held out": (OTHER_DATA % "other", BOTH + "the held-out documents of data.path: "),
    "evaluation": ("{a: , b: {train.eval_sequences: 9}}", BOTH + "the held-out sequences (model.context, "),
    "context": ("{a: , b: {model.context: 32}}", BOTH + "the held-out sequences (model.context, "),
    "isolation": (
        "{a: , b: {data.isolate_documents: true}}",
        BOTH
        + "the held-out sequences (model.context, train.eval_sequences, data.isolate_documents, data.mixing): 3 of "
        "64 tokens and 3 of 64 tokens, documents isolated; give",
    ),
    "mixing": ("{a: , b: {data.mixing: token}}", BOTH + "the held-out sequences (model.context, "),
    "vocabulary": (SYNTHETIC, BOTH + "data.path: "),
    "synthetic": ("{a: , b: {data.path: synthetic}}", BOTH + "data.path: "),
    "two allowed": (
        "{b: {train.steps: 6}, a: , c: {train.steps: 5}}\nmay_differ: {b: [tokens]}",
        "a-s0 and c-s0 differ in train.steps",
    ),
    "batch": ("{a: , b: {train.micro_batch: 3}}", "run b-s0: train.tokens_per_step 512: 8 sequences"),
    "labels": ("{a: , b: {masking.domains: [bio]}}", "run b-s0: "),
    "a sample": (
        "{a: {train.eval_sequences: 9}, b: {train.eval_sequences: 9}}",
        "run a-s0: train.eval_sequences 9: split test of ",
    ),
    "no data": ("{a: {data.path: nowhere}}", "run a-s0: no corpus at nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_before_training(case, sweep_file, capsys):
    variants, expected = REFUSED[case]
    file = sweep_file(f"variants: {variants}")
    assert main(["sweep", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {file}: ") and expected in printed.err
    assert not (file.parent / "runs").exists()


@pytest.mark.parametrize(
    "text",
    [
        "{a: , b: {train.steps: 5}}\nmay_differ: [tokens]",
        "{b: {train.steps: 5}, a: }\nmay_differ: {b: [tokens]}",
        "{a: , b: {data.path: CORPORA/more}}\nmay_differ: {b: [data]}",
        "{a: , b: {model.context: 32}}\nmay_differ: {b: [evaluation]}",
        "{a: , b: {masking.strategy: none, data.upsample: {es: 0}}}",
    ],
)
def test_a_difference_can_be_allowed(text, sweep_file, capsys):
    file = sweep_file(f"variants: {text}")
    assert main(["sweep", str(file), "--dry-run"]) == 0
    assert "2 runs in" in capsys.readouterr().out
    assert not (file.parent / "runs").exists()


def finish(run, losses: dict | None = None, steps: int = 4) -> None:
    """The run directory of a run that has been trained, as far as a sweep looks."""
    run.directory.mkdir(parents=True, exist_ok=True)
    save_config(run.config, run.directory / "config.yaml")
    lines = [{"kind": "step", "step": step, "loss": 5.0} for step in range(1, steps + 1)]
    if losses:
        lines.append({"kind": "eval", "step": 4, "losses": losses})
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


LOSSES = {"full": {"en": 1.0, "web": 2.0, "es": 4.0}, "without es": {"en": 1.5, "web": 2.5, "es": 8.0}}


def test_run_of_other_settings_is_refused(sweep_file):
    file = sweep_file("variants: {a: }")
    (run,) = read_sweep(file).runs
    finish(run, LOSSES)
    file.write_text(file.read_text() + "set: {optimizer.lr: 0.5}\n")
    with pytest.raises(ValueError, match=r"optimizer.lr: 0.001 in the directory, 0.5 in the sweep"):
        run_sweep(file, start=no_start)


def test_run_of_other_data_is_refused(sweep_file, corpora, capsys):
    file = sweep_file("variants: {a: }")
    (run,) = read_sweep(file).runs
    finish(run, LOSSES)
    checkpoint = run.directory / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    facts = {"step": 4, "ranks": 1, "config": {}, "files": {"weights": {"bytes": 1, "sha256": ""}}}
    other, same = (Corpus.open(corpora / name).fingerprint for name in ("more", "data"))
    write_manifest(checkpoint, {"corpus": other, **facts})
    refusal = f"{run.directory} was trained on another corpus than {corpora / 'data'}; restore that corpus, rename the"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        run_sweep(file, start=no_start)
    assert main(["sweep", str(file), "--dry-run"]) == 2 and refusal in capsys.readouterr().err
    write_manifest(checkpoint, {"corpus": same, **facts})
    assert state_of(run, Corpus.open(corpora / "data")) == FINISHED


def test_finished_runs_are_not_started_again(sweep_file, capsys):
    file = sweep_file("variants: {a: , b: }")
    for run in read_sweep(file).runs:
        finish(run, LOSSES)
    assert run_sweep(file, start=no_start) == 0
    assert "2 of 2 runs finished before; training 0" in capsys.readouterr().out


def test_table_has_mean_and_spread(sweep_file):
    file = sweep_file("variants: {a: , b: }\nseeds: [0, 1, 2]")
    sweep = read_sweep(file)
    for run in sweep.runs:
        if run.variant == "a":
            shifted = {key: {c: v + run.seed for c, v in by.items()} for key, by in LOSSES.items()}
            finish(run, shifted)
        else:
            finish(run)
    assert main(["sweep", str(file), "--table"]) == 0
    a, b = csv.DictReader((sweep.folder / "table.csv").read_text().splitlines())
    means = [float(a[key]) for key in ("full_retain", "full_forget", "ablated_retain", "ablated_forget")]
    assert means == [2.5, 5.0, 3.0, 9.0] and float(a["full_retain_sd"]) == 1.0
    assert (a["finished"], a["runs"], a["tokens"], b["finished"], b["full_retain"]) == ("3", "3", "2048", "0", "")
    assert (sweep.folder / "figures" / "losses.png").is_file()


def test_nothing_is_ablated_from_a_variant_without_masks(sweep_file):
    """Not even where an older evaluation has the losses."""
    file = sweep_file("variants: {a: {masking.strategy: none}, b: }")
    sweep = read_sweep(file)
    for run in sweep.runs:
        finish(run, LOSSES)
    assert main(["sweep", str(file), "--table"]) == 0
    rows, console = read_rows(sweep, open_corpora(sweep)), Console(width=100, record=True, file=io.StringIO())
    print_table(rows, console)
    printed = console.export_text()
    assert "retain: mean over the categories that no domain owns, unlabeled ones too" in printed
    (a, b) = (line.split()[-4:] for line in printed.splitlines() if line.split()[:2] in (["a", "1"], ["b", "1"]))
    assert (a, b) == (["1.500", "4.000", "-", "-"], ["1.500", "4.000", "2.000", "8.000"])
    a, b = csv.DictReader((sweep.folder / "table.csv").read_text().splitlines())
    assert (a["full_retain"], a["ablated_retain"], b["ablated_retain"]) == ("1.5", "", "2.0")
    assert len(losses_figure(rows).axes[0].containers) == 3


def test_loss_that_is_not_finite_has_no_mean(sweep_file):
    (run,) = read_sweep(sweep_file("variants: {a: }")).runs
    losses = {**LOSSES, "full": {"en": None, "web": 2.0, "es": 4.0}}
    means = losses_of(losses, LABELS, run)
    assert math.isnan(means["full_retain"]) and means["full_forget"] == 4.0


def test_figures_need_no_finished_run(sweep_file):
    file = sweep_file("variants: {a: }")
    assert run_sweep(file, table=True) == 0
    assert read_rows(read_sweep(file), {"a-s0": None})[0].mean("full_retain") is None


def test_threads_and_memory_are_divided(sweep_file, monkeypatch):
    sweep = read_sweep(sweep_file("variants: {a: , b: , c: }"))
    need = schedule.need(sweep.runs[0])
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))

    def room(memory: float, **options) -> tuple[int, int]:
        monkeypatch.setattr(schedule.psutil, "virtual_memory", lambda: type("Memory", (), {"available": memory}))
        room = schedule.find_room(sweep, **options)
        return room.jobs, room.threads

    assert room(100 * need) == (3, 5)
    assert room(2.5 * need) == (2, 8)
    assert room(0.5 * need) == (1, 16)
    assert room(100 * need, jobs=1) == (1, 16)
    assert room(100 * need, threads=8) == (2, 8)
    sweep.folder.mkdir(parents=True)
    schedule.keep_threads(sweep, schedule.Room(3, 5, 0.0))
    assert room(1.5 * need) == (1, 5), "a sweep that is continued has the threads of its first call"


def test_runs_share_the_memory(sweep_file):
    runs = read_sweep(sweep_file("variants: {a: , b: }")).runs
    room = schedule.Room(2, 1, 1.5 * schedule.need(runs[0]))
    assert _fits(runs[0], [], room) and not _fits(runs[1], [runs[0]], room)
    assert _fits(runs[1], [runs[0]], schedule.Room(2, 1, 2.5 * schedule.need(runs[0])))


def test_gpus_are_given_out_one_by_one(sweep_file, monkeypatch):
    sweep = read_sweep(sweep_file("variants: {a: , b: , c: }"))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    room = schedule.find_room(sweep)
    assert (room.jobs, room.devices) == (2, ("4", "6"))
    assert room.environment("6") == {"CUDA_VISIBLE_DEVICES": "6"}


def test_remaining_time_is_that_of_all_runs(sweep_file, monkeypatch, capsys):
    """Runs of 4 steps, the second of twice the tokens: after the first step two more take 40 s, and 9 are left."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    text = "variants: {a: , b: {train.tokens_per_step: 1024}}\nmay_differ: [tokens]"
    a, b = read_sweep(sweep_file(text)).runs
    with progress.Progress([a, b], []) as shown:
        shown.started(a)
        assert shown.remaining() == "remaining time unknown"
        for clock[0], steps in ((110.0, 0), (150.0, 1), (190.0, 3)):
            finish(a, steps=steps)
            shown.update()
    assert shown.remaining() == "about 3 min left"
    printed = capsys.readouterr().out
    assert "started a-s0" in printed
    assert "0 of 2 runs finished, 1 training, 25% of all steps; about 3 min left" in printed


def test_steps_done_of_a_log_that_was_cut_short(tmp_path):
    assert steps_done(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 7}\n{"kind": "step", "st')
    assert steps_done(tmp_path) == 7


def slurm(tools: Path, monkeypatch, **commands: str) -> None:
    """The working directory has launch/, and the PATH these commands, in Python."""
    tools.mkdir()
    for name, does in commands.items():
        (tools / name).write_text(f"#!{sys.executable}\nimport json, sys\n{does}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)


def test_unfinished_runs_are_submitted_once(sweep_file, tmp_path, monkeypatch, capsys):
    file = sweep_file("variants: {a: , b: , c: }")
    sweep = read_sweep(file)
    finish(sweep.runs[0], LOSSES)
    jobs = tmp_path / "jobs"
    note = f"open({str(jobs)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n'); print('Submitted batch job 7')"
    queue = "print('42' if any(word.endswith('.b-s0') for word in sys.argv) else '')"
    slurm(tmp_path / "bin", monkeypatch, sbatch=note, squeue=queue)
    assert main(["sweep", str(file), "--launcher", "slurm", "--gpus", "2"]) == 0
    (job,) = map(json.loads, jobs.read_text().splitlines())
    config, log = sweep.folder / "configs" / "c-s0.yaml", sweep.folder / "logs" / "c-s0.log"
    shape = ["--nodes", "1", "--gpus-per-node", "2", "--ntasks-per-node", "2"]
    expected = ["--job-name", "mine.c-s0", "--output", str(log), *shape, "launch/slurm.sbatch", str(config), "--resume"]
    assert job == expected
    printed = capsys.readouterr().out
    assert "c-s0: Submitted batch job 7" in printed and "b-s0 is in the queue already: job 42" in printed


def test_a_submission_that_slurm_refuses_is_an_error(sweep_file, tmp_path, monkeypatch, capsys):
    """With what SLURM prints, and no later run is submitted."""
    refusal = f"open({str(tmp_path / 'jobs')!r}, 'a').write('one '); sys.exit('QOSMaxSubmitJobPerUserLimit')"
    slurm(tmp_path / "bin", monkeypatch, sbatch=refusal, squeue="")
    file = sweep_file("variants: {a: , b: }")
    assert main(["sweep", str(file), "--launcher", "slurm", "--gpus", "2"]) == 2
    assert "QOSMaxSubmitJobPerUserLimit" in capsys.readouterr().err
    assert (tmp_path / "jobs").read_text() == "one "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "2"], "--nodes and --gpus belong to --launcher slurm"),
        (["--gpus", "2"], "--nodes and --gpus belong to --launcher slurm"),
        (["--launcher", "slurm", "--jobs", "2"], "--jobs and --threads are for runs on this machine"),
        (["--launcher", "slurm", "--threads", "2"], "--jobs and --threads are for runs on this machine"),
    ],
)
def test_options_of_the_other_place_are_refused(options, message, sweep_file, capsys):
    file = sweep_file("variants: {a: , b: }")
    assert main(["sweep", str(file), *options]) == 2
    assert message in capsys.readouterr().err
