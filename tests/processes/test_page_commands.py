"""Commands of the pages that would take long or need a cluster: what `make` would execute, and that scripts exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sgtm.commands.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch/README.md"]
LAUNCH = (ROOT / "launch" / "README.md").read_text("utf-8")
# What a target executes.
EXECUTED = {
    "install": ".venv/bin/python -m pip install",
    "quickstart": ".venv/bin/sgtm quickstart",
    "test": ".venv/bin/python -m pytest -n 3",
    "quick": ".venv/bin/python -m pytest --quick",
    "lint": ".venv/bin/ruff check .",
    "mutants": ".venv/bin/python tests/mutants.py",
    "cluster-test": ".venv/bin/python -m pytest tests/cluster",
    "fault-campaign": ".venv/bin/python tests/faults/campaign.py",
    "aot": ".venv/bin/python -m sgtm_kernels.tools.aot",
    "gpu": "python3 benchmarks/gpu.py --out gpu-run",
}


def lines_of_blocks(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return [line.partition(" # ")[0].strip() for block in blocks for line in block.splitlines()]


def targets() -> set[str]:
    """What pages name after `make`, in a block or within a sentence, and what .ci/run makes."""
    named = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.M))
    for page in PAGES:
        text = page.read_text("utf-8")
        named |= {words[1] for line in lines_of_blocks(text) if (words := line.split())[:1] == ["make"]}
        named |= set(re.findall(r"`make ([\w-]+)[^`]*`", text))
    return named


def test_every_target_that_pages_name_is_checked():
    assert targets() == set(EXECUTED)


@pytest.mark.parametrize("target", EXECUTED)
def test_make_would_execute(target):
    # Without what an outer make has put into the environment.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    done = subprocess.run(["make", "-n", "-B", target], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert EXECUTED[target] in done.stdout
    for file in re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", done.stdout):
        assert (ROOT / file).is_file(), file


def commands_of_launch() -> list[list[str]]:
    """Words of the commands of launch/README.md, without variables that are set before them."""
    words = [shlex.split(line) for line in lines_of_blocks(LAUNCH)]
    return [[word for word in line if not re.match(r"[A-Z_]+=", word)] for line in words]


def test_the_scripts_of_launch_exist_and_are_bash():
    commands = commands_of_launch()
    assert [words[0] for words in commands] == [
        *("launch/local.sh",) * 2,
        "launch/torchrun.sh",
        "launch/deepspeed.sh",
        "sbatch",
    ]
    scripts = {word for words in commands for word in words if word.startswith("launch/")}
    scripts |= {f"launch/{name}" for name in re.findall(r"`([\w.]+\.(?:sh|sbatch))`", LAUNCH)}
    assert scripts == {
        f"launch/{path.name}" for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")
    }
    for script in scripts:
        subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    for words in commands:
        assert words[0] == "sbatch" or os.access(ROOT / words[0], os.X_OK), words[0]


def test_the_launch_command_of_its_page_composes(capsys):
    (command,) = re.findall(r"`sgtm (launch my\.yaml[^`]*)`", LAUNCH)
    assert main([*shlex.split(command.replace("my.yaml", "quickstart")), "--dry-run", "--memory", "80"]) == 0
    assert "launch/torchrun.sh quickstart" in capsys.readouterr().out
