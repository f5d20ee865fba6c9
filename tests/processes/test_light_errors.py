"""A mistake is printed before anything heavy is imported: torch takes a second, deepspeed and transformers several.

Each command runs in a process of its own, whose modules are looked at afterwards; times would depend on the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import build, record, write_jsonl

from sgtm.config import load_config, save_config

HEAVY = ("torch", "deepspeed", "transformers", "datasets", "pyarrow", "matplotlib", "wandb", "triton")
CODE = f"""
import json, sys
from sgtm.commands.main import main
for line in json.load(sys.stdin):
    try:
        status = main(line)
    except SystemExit as error:
        status = error.code
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    print(json.dumps([status, loaded]), flush=True)
    print("end of one", file=sys.stderr, flush=True)
    if loaded:
        break
"""

MISTAKES = {
    "train nosuch.yaml": "no such file",
    "train slip.yaml": "did you mean train.steps?",
    "train debug --steps 3": "did you mean --train.steps?",
    "train debug --train.stepz 3": "did you mean train.steps?",
    "train debug --model.heads 3": "is not a multiple of heads 3",
    "train debug --masking.joint some": "masking.joint",
    "train debug --data.path nosuch": "no corpus at nosuch",
    "train debug --name mine": "runs/mine exists; continue with --resume",
    "train runs/none --resume": "not a run directory",
    "train runs/mine": "is a run directory; resume it",
    "eval runs/none": "not a run directory",
    "eval runs/mine --splti test": "unrecognized arguments: --splti",
    "eval runs/mine --split tset": "no split 'tset' (did you mean test?); its splits are",
    "eval runs/mine --data.path nosuch": "no corpus at nosuch: the folder does not exist; restore it, or give",
    "examine runs/none": "not a run directory",
    "examine runs/mine --against runs/none": "not a run directory",
    "examine runs/mine --split tset": "no split 'tset' (did you mean test?); its splits are",
    "examine runs/mine --data.path nosuch": "no corpus at nosuch",
    "examine runs/mine --texts nosuch.txt": "nosuch.txt: No such file or directory",
    "tamper runs/none": "not a run directory",
    "tamper runs/mine --baseline runs/none": "not a run directory",
    "tamper runs/mine --data.path nosuch": "no corpus at nosuch",
    "unlearn runs/none --method npo --out x": "not a run directory",
    "unlearn runs/mine --method npo --out x --data.path nosuch": "no corpus at nosuch",
    "adapt runs/none --out x": "not a run directory",
    "adapt runs/mine --out x --data.path nosuch": "no corpus at nosuch",
    "direction runs/none --out x.safetensors": "not a run directory",
    "direction runs/mine --out x.safetensors --data.path nosuch": "no corpus at nosuch",
    "train debug --steering.direction nosuch.safetensors": "nosuch.safetensors: No such file or directory; write it",
    "train debug --steering.direction rules.yaml": "rules.yaml is damaged, or no file of sgtm direction",
    "train debug --steering.direction es.safetensors --steering.layer 2": "steering.layer 2: the blocks of",
    "train debug --steering.strength 2": "strength 2 without a direction adds nothing: set direction to a file",
    "eval runs/mine --steer much": "--steer: expected a number, got 'much'",
    "export runs/none --out x": "not a run directory",
    "generate runs/none --prompt a": "not a run directory",
    "generate runs/mine --prompt a --data.path nosuch": "no corpus at nosuch",
    "generate runs/mine --prompt a --remove it": "unknown domain 'it'; known domains: es",
    "generate corpus --prompt a --remove es": "nor is it an exported folder",
    "compare runs/mine --data a.jsonl": "runs/mine is compared with nothing",
    "compare runs/mine --remove es --data nosuch.txt": "no such file or folder: nosuch.txt",
    "demo runs/none": "not a run directory",
    "demo runs/mine --data.path nosuch": "no corpus at nosuch",
    "report runs/none": "not a run directory",
    "report runs/mine --baseline runs/none": "not a run directory",
    "checkpoint verify runs/none": "holds no checkpoint",
    "explain slip.yaml": "did you mean train.steps?",
    "config nosuch": "unknown preset",
    "estimate slip.yaml": "did you mean train.steps?",
    "estimate debug --nodes 0": "expected a whole number above 0",
    "estimate debug --reached 50": "expected a share above 0 and at most 1, got '50'",
    "estimate runs/mine": "runs/mine is a run directory; its config is runs/mine/config.yaml",
    "estimate some.sweep.yaml": "some.sweep.yaml is a sweep file; train its runs with: sgtm sweep",
    "estimate debug --gpus 7": "do not divide among 7 ranks",
    "launch debug --name mine": "runs/mine exists; continue with --resume",
    "launch debug --hostfile nohost": "--hostfile: no such file: nohost",
    "launch debug --rendezvous http://node-0:29400": "--rendezvous: found 'http://node-0:29400', but it takes HOST",
    "launch debug --rendezvous node-0:294000": "a port is 1 to 65535",
    "launch debug --launcher torchrun": "needs --rendezvous",
    "launch debug --gpus 7 --dry-run": "do not divide among 7 ranks",
    "bench --preset debug": "unrecognized arguments: --preset; write the preset without --preset",
    "quickstart --overwrite": "quickstart has no --overwrite",
    "sweep slip.yaml": "slip.yaml is a config, not a sweep file; train it with: sgtm train slip.yaml",
    "sweep lost.sweep.yaml": "base: no such file: nosuch/my.yaml; relative to the sweep file that is nosuch/my.yaml",
    "train runs/mine/checkpoints --resume": "is inside the run directory runs/mine; give runs/mine",
    "train runs/renamed --resume": "checkpoints holds best, and no checkpoint named step_",
    "train runs/mine --resume --data.path moved": "if the data have moved, give their folder with --data.path DIR",
    "bench debug --rounds 0": "expected a whole number above 0",
    "profile slip.yaml": "did you mean train.steps?",
    "quickstart --train.stepz 3": "did you mean train.steps?",
    "quickstart --name mine": "runs/mine exists; continue with --resume",
    "doctor --check slip.yaml": "did you mean train.steps?",
    "prepare nosuch --rules rules.yaml --out x": "no such file or folder: nosuch",
    "prepare a.jsonl --rules nosuch.yaml --out x": "no rule file at nosuch.yaml",
    "traim debug": "invalid choice",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a corpus, a run of it without a checkpoint, and a config with a slip."""
    folder = tmp_path_factory.mktemp("mistakes")
    build(folder / "corpus", [record(0), record(1, split="test")])
    (folder / "slip.yaml").write_text("extends: debug\ntrain: {stepz: 3}\n")
    write_jsonl(folder / "a.jsonl", [record(0)])
    (folder / "rules.yaml").write_text("labels: {en: retain}\n")
    (folder / "some.sweep.yaml").write_text("base: debug\nvariants: {a: {}}\n")
    (folder / "lost.sweep.yaml").write_text("base: nosuch/my.yaml\nvariants: {a: {}}\n")
    (folder / "runs/mine/checkpoints").mkdir(parents=True)
    (folder / "runs/renamed/checkpoints/best").mkdir(parents=True)
    (folder / "runs/renamed/checkpoints/best/manifest.json").write_text("{}")
    save_config(load_config("debug", ["--name=renamed"]), folder / "runs/renamed/config.yaml")
    save_config(load_config("debug", ["--name=mine", "--data.path=corpus"]), folder / "runs/mine/config.yaml")
    return folder


def test_mistakes_import_nothing_heavy(folder):
    """One process for all: what one imports the next would be blamed for, so the first ends it."""
    lines = json.dumps([line.split() for line in MISTAKES])
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True)
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    messages = done.stderr.split("end of one\n")
    for (line, expected), (status, loaded), message in zip(MISTAKES.items(), outcomes, messages, strict=False):
        assert loaded == [], line
        assert status == 2 and expected in message, (line, message)
    assert len(outcomes) == len(MISTAKES)


def test_help_with_all_keys_and_a_plan_import_no_torch(folder):
    lines = json.dumps([["train", "--help"], ["config", "debug"], ["estimate", "debug", "--gpus", "4"]])
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=folder, input=lines, capture_output=True, text=True)
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[0,")]
    assert outcomes == [[0, []]] * 3, done.stderr
