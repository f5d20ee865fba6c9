"""The data of a run are found from any working directory, and where run or project have moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgtm.config import load_config, save_config
from sgtm.config.load import load_run_config
from sgtm.run.located import check_run, folders_tried, locate_data, overrides_of, record_folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    """A project with a corpus in data/text and a run of it, trained there; the tests are elsewhere."""
    project = tmp_path / "project"
    (project / "data" / "text").mkdir(parents=True)
    monkeypatch.chdir(project)
    add_run("runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return project


def add_run(runs: str, data: str = "data/text", record: bool = True) -> Path:
    run = Path(runs) / "mine"
    run.mkdir(parents=True)
    save_config(load_config("debug", [f"--runs={runs}", "--name=mine", f"--data.path={data}"]), run / "config.yaml")
    if record:
        record_folder(run)
    return run


def located(run: Path, data: str | None = None) -> Path:
    return Path(locate_data(load_run_config(run), run, data).data.path)


def test_a_relative_path_is_that_of_the_run(project: Path, monkeypatch):
    run = project / "runs" / "mine"
    assert located(run) == project / "data/text"
    assert located(Path("../project/runs/mine")) == project / "data/text"
    monkeypatch.chdir(run)
    assert located(Path(".")) == project / "data/text"
    monkeypatch.chdir(project)
    assert located(Path("runs/mine")) == Path("data/text"), "unchanged where it leads there"


def test_what_is_here_by_the_same_name_is_not_taken_for_it(project: Path):
    Path("data/text").mkdir(parents=True)
    assert located(project / "runs/mine") == project / "data/text"


def test_a_path_that_is_given_is_relative_to_here(project: Path):
    for folder in (project, Path()):
        (folder / "copy").mkdir()
    assert located(project / "runs/mine", "copy") == Path("copy")
    assert located(project / "runs/mine", "nowhere") == Path("nowhere")


def test_run_and_project_may_move(project: Path):
    (project / "archive").mkdir()
    run = (project / "runs/mine").rename(project / "archive/mine")
    assert located(run) == project / "data/text"
    run.rename(project / "runs/mine")
    moved = project.rename(project.with_name("moved"))
    assert located(moved / "runs/mine") == moved / "data/text"


def test_a_copied_project_has_its_own_data(project: Path):
    (copy := project.with_name("copy")).mkdir()
    for path in ("data", "runs"):
        (project / path).rename(copy / path)
    (project / "data/text").mkdir(parents=True)
    assert located(copy / "runs/mine") == copy / "data/text"


def test_runs_elsewhere_and_runs_of_older_versions(project: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(project)
    far, old = add_run(str(tmp_path / "scratch")), add_run("old", record=False)
    old = old.absolute()
    monkeypatch.chdir(tmp_path)
    assert located(far) == located(old) == project / "data/text"


def test_absolute_paths_and_data_that_are_gone_are_left(project: Path, monkeypatch):
    run = project / "runs/mine"
    (project / "data/text").rmdir()
    config = locate_data(load_run_config(run), run)
    assert config.data.path == "data/text"
    assert folders_tried(config, run) == f"{project}, {Path.cwd()}"
    monkeypatch.chdir(project)
    absolute = add_run("absolute", str(project / "data"))
    assert located(absolute) == project / "data" and folders_tried(load_run_config(absolute), absolute) == ""


def test_the_synthetic_corpus_lies_beside_the_run_or_where_it_was_written(project: Path, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(project)
    run = add_run("own", "synthetic").absolute()
    (project / "own" / "synthetic-512").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_data(load_run_config(run), run).runs == str(project / "own")
    moved = run.rename(project / "moved")
    assert locate_data(load_run_config(moved), moved).runs == str(project / "own")


def test_a_run_is_resumed_with_its_data_from_anywhere(project: Path):
    run = project / "runs/mine"
    assert overrides_of(run) == [f"--runs={run.parent}", "--name=mine", f"--data.path={project / 'data/text'}"]


def test_a_direction_is_found_from_another_folder_too(project: Path):
    run, file = project / "runs/mine", project / "es.safetensors"
    steered = load_config("debug", ["--runs=runs", "--name=mine", "--steering.direction=es.safetensors"])
    save_config(steered, run / "config.yaml")
    assert overrides_of(run)[-1] == "--steering.direction=es.safetensors"
    file.touch()
    assert overrides_of(run)[-1] == f"--steering.direction={file}"


def test_data_that_are_gone_are_an_error_with_where_they_were_looked_for(project: Path):
    run = project / "runs/mine"
    assert check_run(run) == load_run_config(run)
    (project / "data/text").rmdir()
    remedy = "the folder does not exist; restore it, or give the folder of the run's corpus with --data.path DIR"
    with pytest.raises(ValueError, match=f"^no corpus at data/text, relative to {project}, {Path.cwd()}: {remedy}$"):
        check_run(run)
    with pytest.raises(ValueError, match=f"^no corpus at gone: {remedy}$"):
        check_run(run, "gone")
    absolute = add_run("absolute", "/nowhere/text")
    with pytest.raises(ValueError, match=f"^no corpus at /nowhere/text: {remedy}$"):
        check_run(absolute)
    check_run(add_run("synthetic", "synthetic"))  # it is looked for where it is opened
