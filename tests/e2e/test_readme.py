"""The commands of README and docs, page by page, with the README's rules and `my.yaml`, on a small corpus.

Not run: `bench`, `profile` and what needs a GPU, which have tests of their own, and the shipped sweep, which takes half
an hour. Tried and seen to fail: a preset whose micro-batch holds a whole step, on two ranks; a flag that does not exist
in docs/checkpoints.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = ("checkpoints", "launching", "performance", "sweep")  # docs/data.md has the README's command
TEXT = "\n".join([README, *((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)])
BLOCKS = re.findall(r"^```(?:\w*)\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line.split("  #")[0].split(" # ")[0] for b in BLOCKS for line in b.splitlines() if line.startswith("sgtm ")]
TORCHRUN = next(line for block in BLOCKS for line in block.splitlines() if line.startswith("torchrun"))
SHORT = ["--train.eval_sequences=2", "--optimizer.warmup_steps=1", "--train.eval_every=1", "--train.steps=3"]
SWEEP = "base: my.yaml\nset: {train: {steps: 2, eval_sequences: 2}, optimizer.warmup_steps: 1}\nvariants: {a: , b: }\n"


def prepare_folder(folder: Path) -> None:
    """Data, and the files that the README shows, with a smaller vocabulary."""
    rules = next(block for block in BLOCKS if "# rules.yaml" in block)
    mine = next(block for block in BLOCKS if "extends: quickstart" in block)
    (folder / "rules.yaml").write_text(rules)
    (folder / "my.yaml").write_text(mine.replace("4096", "300"))
    (folder / "my.sweep.yaml").write_text(SWEEP)
    words, rng = ["water", "virus", "house", "protein", "green", "walks"], random.Random(0)
    with (folder / "DATA.jsonl").open("w") as file:
        for number in range(1200):
            source = ("web", "virology")[number % 4 == 0]
            text = f"{number} " + " ".join(rng.choices(words, k=60))
            file.write(json.dumps({"text": text, "source": source}) + "\n")


def follow(folder: str) -> None:
    """All commands in one process, which imports torch once. Exits with those that did not end with status 0."""
    from sgtm.commands.main import main

    os.chdir(folder)
    failed = []
    for command in COMMANDS:
        command = command.replace("DATA...", "DATA.jsonl").replace("4096", "300")
        words = shlex.split(command.replace("launch/recipes", str(ROOT / "launch" / "recipes")))[1:]
        if words[0] in ("bench", "profile") or ("quickstart.sweep" in command and "--dry-run" not in words):
            continue
        if words[0] == "train":
            words += SHORT
        if words[0] == "tamper":
            words += ["--steps=1", "--lr=1", "--data=forget", "--sequences=2"]
        if main(words):
            failed.append(command)
    sys.exit("; ".join(failed) or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    prepare_folder(folder)
    return folder


def test_every_command_of_the_readme(folder):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {shlex.split(command)[1] for command in COMMANDS}
    wanted = "prepare explain train eval tamper export report sweep launch checkpoint estimate"
    assert not set(wanted.split()) - ran
    assert "export/safe" in README and (folder / "export" / "safe" / "model.safetensors").exists()
    assert (folder / "runs" / "mine" / "report" / "index.html").exists()


def test_the_torchrun_command_on_two_ranks(folder):
    words = shlex.split(TORCHRUN.replace("--nproc_per_node 8", "--nproc_per_node 2"))
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--name=two", *SHORT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs" / "two" / "metrics.jsonl").exists()


if __name__ == "__main__":
    follow(sys.argv[1])
