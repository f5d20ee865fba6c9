"""The experiments: what each has, and that its commands name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sgtm.sweep import study_figures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiments(benchmarks):
    import experiments

    return experiments


def test_every_figure_is_one_of_a_study(experiments):
    for name, experiment in experiments.EXPERIMENTS.items():
        assert all(callable(getattr(study_figures, figure)) for figure in experiment.figures), name
        assert experiment.question.endswith("?") and experiment.commands, name
        assert not (run := [*ROOT.glob(f"benchmarks/results/*/{name}.jsonl")]) or experiment.meaning, run


def test_the_commands_name_files_and_rows_that_are_there(experiments):
    """Recipes, rules and scripts are in the tree, and what the last command writes is the experiment's file."""
    for name, experiment in experiments.EXPERIMENTS.items():
        paths = re.findall(r"\b(?:launch|benchmarks|examples)/[\w./-]+\.(?:yaml|py)\b", experiment.commands)
        assert paths and all((ROOT / path).is_file() for path in paths), name
        assert experiment.commands.endswith(f"--json benchmarks/results/DEVICE/{name}.jsonl"), name
        assert "{{" not in experiment.commands, name


def test_a_folder_may_be_named_as_a_word_of_the_commands(experiments):
    values = {"NOVELS": Path("/texts/DEVICE/n v"), "ARXIV": None, "DEVICE": "mine"}
    assert experiments.filled("prepare NOVELS --json DEVICE/x", values) == "prepare '/texts/DEVICE/n v' --json mine/x"
