"""The commands of README and docs, page by page, with the README's rules and `my.yaml`, on a small corpus.

Not run: NOT_RUN, and what begins with `make` or `launch/` (tests/processes/test_page_commands.py).
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
PAGES = ("checkpoints", "launching", "performance", "sweep", "inference")  # docs/data.md has the README's command
TEXT = "\n".join([README, *((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)])
BLOCKS = re.findall(r"^```(?:\w*)\n(.*?)^```", TEXT, re.M | re.S)
LINES = [line.partition(" # ")[0].rstrip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("sgtm ")]
# `bench`, `profile` and `demo` have tests of their own; the sweep takes half an hour.
NOT_RUN = [
    "sgtm bench my.yaml",
    "sgtm bench my.yaml --peers",
    "sgtm bench my.yaml --kernels.backend triton --tune",
    "sgtm profile my.yaml",
    "sgtm profile my.yaml --kernel norm_forward",
    "sgtm sweep launch/recipes/quickstart.sweep.yaml",
    "sgtm demo runs/mine",
]
ELSEWHERE = {"make", "torchrun", "python"}  # what other commands of these blocks begin with
RAN = "ran.txt"
TORCHRUN = next(line for block in BLOCKS for line in block.splitlines() if line.startswith("torchrun"))
SHORT = {
    "train": ["--train.eval_sequences=2", "--optimizer.warmup_steps=1", "--train.eval_every=1", "--train.steps=3"],
    "generate": ["--tokens=3"],
    "tamper": ["--steps=1", "--lr=1", "--data=forget", "--sequences=2"],
}
SWEEP = "base: my.yaml\nset: {train: {steps: 2, eval_sequences: 2}, optimizer.warmup_steps: 1}\nvariants: {a: , b: }\n"


def prepare_folder(folder: Path) -> None:
    """Data, and the files that the README shows, with a smaller vocabulary."""
    rules = next(block for block in BLOCKS if "# rules.yaml" in block)
    mine = next(block for block in BLOCKS if "extends: quickstart" in block)
    (folder / "rules.yaml").write_text(rules)
    (folder / "my.yaml").write_text(mine.replace("4096", "300"))
    (folder / "my.sweep.yaml").write_text(SWEEP)
    for name in ("prompt.txt", "chapter.txt"):
        (folder / name).write_text("The green virus walks.\n")
    (folder / "texts.jsonl").write_text('{"text": "The protein of a virus."}\n')
    words, rng = ["water", "virus", "house", "protein", "green", "walks"], random.Random(0)
    with (folder / "DATA.jsonl").open("w") as file:
        for number in range(1200):
            source = ("web", "virology")[number % 4 == 0]
            text = f"{number} " + " ".join(rng.choices(words, k=60))
            file.write(json.dumps({"text": text, "source": source}) + "\n")


def follow(folder: str) -> None:
    """All commands in one process, which imports torch once: writes those that end with status 0 into the file RAN."""
    from sgtm.commands.main import main

    os.chdir(folder)
    for command in COMMANDS:
        if command in NOT_RUN:
            continue
        small = command.replace("DATA...", "DATA.jsonl").replace("4096", "300")
        words = shlex.split(small.replace("launch/recipes", str(ROOT / "launch" / "recipes")))[1:]
        if main([*words, *SHORT.get(words[0], ())]) == 0:
            with Path(RAN).open("a") as file:
                file.write(f"{command}\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    prepare_folder(folder)
    return folder


def test_every_command_of_the_readme(folder):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = (folder / RAN).read_text().splitlines()
    assert ran == [command for command in COMMANDS if command not in NOT_RUN], done.stdout + done.stderr
    assert "export/safe" in README and (folder / "export" / "safe" / "model.safetensors").exists()
    assert (folder / "runs" / "mine" / "report" / "index.html").exists()


def test_no_command_is_overlooked():
    """Every line of a block with commands is one, and the commands of `sgtm` are these."""
    names = (
        "prepare explain train eval export generate report train train report tamper sweep",  # README
        "train checkpoint checkpoint launch estimate estimate bench bench bench profile profile",
        "sweep sweep report report",
        "generate generate compare compare demo",
    )
    assert [command.split()[1] for command in COMMANDS] == " ".join(names).split()
    assert set(NOT_RUN) <= set(COMMANDS)
    for block in BLOCKS:
        first = {line.split()[0] for line in block.splitlines()}
        assert not first & {"sgtm", *ELSEWHERE} or first <= {"sgtm", *ELSEWHERE}, block


def test_the_torchrun_command_on_two_ranks(folder):
    words = shlex.split(TORCHRUN.replace("--nproc_per_node 8", "--nproc_per_node 2"))
    prepare = ["prepare", "DATA.jsonl", "--rules", "rules.yaml", "--out", "data/mine", "--vocab-size", "300"]
    subprocess.run([sys.executable, "-m", "sgtm", *prepare], cwd=folder, check=True, capture_output=True)
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--name=two", *SHORT["train"]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs" / "two" / "metrics.jsonl").exists()


if __name__ == "__main__":
    follow(sys.argv[1])
