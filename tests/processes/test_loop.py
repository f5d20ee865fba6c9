"""What the training loop decides, without training: the run directory, signals, a gradient that is not finite."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from corpora import build, config_for, mixed_records, record
from tiny import tiny_config

from sgtm.config import load_config
from sgtm.data.store import Corpus
from sgtm.process.signals import SIGNALS, Stopped
from sgtm.run import directory
from sgtm.run.checkpoint import write_manifest
from sgtm.run.usable import check_usable
from sgtm.training import loop
from sgtm.training.loop import StopSignal


class Log:
    """A log that opens, or is refused as wandb refuses one; remembers what was said."""

    seconds = 0.0

    def __init__(self, run: Path | None = None, refused: bool = False):
        self.run, self.refused, self.messages, self.evaluated = run, refused, [], []

    def open(self) -> set[int]:
        (self.run / "wandb.id").write_text("id")
        if self.refused:
            raise ValueError("wandb.mode online: no login")
        return {3}

    def step(self, values: dict) -> None: ...

    def evaluation(self, step: int, losses: dict, norms: dict, sample: dict) -> None:
        self.evaluated.append(step)

    def checkpoint(self, saved: object) -> None: ...

    def print(self, text: str) -> None:
        self.messages.append(text)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begin(run: Path, refused: bool = False, resume: bool = False, overwrite: bool = False) -> set[int]:
    return directory.begin(run, tiny_config(), Log(run, refused), resume, overwrite)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run that somebody has trained for weeks."""
    run = tmp_path / "runs" / "old"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("name: old\n")
    (run / "checkpoints" / "weights").write_text("weeks")
    return run


@pytest.mark.parametrize("link", [False, True])
def test_a_refused_overwrite_leaves_the_old_run(old: Path, link: bool):
    run = old
    if link:
        run = old.parent / "link"
        run.symlink_to(old)
    before = contents(old.parent)
    with pytest.raises(ValueError, match="no login"):
        begin(run, refused=True, overwrite=True)
    assert contents(old.parent) == before
    assert begin(run, overwrite=True) == {3}
    assert set(contents(old)) == {"config.yaml", "wandb.id", "trained_in", "environment.jsonl"}
    assert "layers: 2" in (old / "config.yaml").read_text()
    assert {path.name for path in old.parent.iterdir()} == {"old", run.name}


def test_a_refused_resume_leaves_the_config(old: Path):
    with pytest.raises(ValueError, match="no login"):
        begin(old, refused=True, resume=True)
    assert contents(old) == {"config.yaml": b"name: old\n", "checkpoints/weights": b"weeks", "wandb.id": b"id"}
    begin(old, resume=True)
    assert "layers: 2" in (old / "config.yaml").read_text() and (old / "checkpoints/weights").exists()


def test_a_refused_first_start_leaves_no_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="no login"):
        begin(tmp_path / "new", refused=True)
    assert not list(tmp_path.iterdir())
    assert begin(tmp_path / "new") == {3}


def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(ValueError, match=r"thesis holds other files and no run .*not overwritten"):
        begin(tmp_path / "thesis", overwrite=True)
    assert contents(tmp_path) == {"thesis/chapter.tex": b"years"}
    with pytest.raises(ValueError, match="exists; continue with --resume"):
        begin(tmp_path / "thesis")


def test_a_file_in_the_place_of_the_run_directory_is_refused(tmp_path: Path):
    (tmp_path / "new").touch()
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"new is a file, in the place of the run directory; move it away, or"):
            begin(tmp_path / "new", **options)
    assert contents(tmp_path) == {"new": b""}


@pytest.mark.parametrize("kind", ["file", "link to nothing"])
def test_checkpoints_that_are_no_folder_are_refused_before_training(old: Path, kind: str):
    folder = old / "checkpoints"
    folder.rename(old.parent / "elsewhere")
    folder.touch() if kind == "file" else folder.symlink_to(old.parent / "not mounted")
    with pytest.raises(ValueError, match=r"old/checkpoints is no folder, but a file or a link to nothing; put"):
        check_usable(old, resume=True, overwrite=False)
    check_usable(old, resume=False, overwrite=True)
    folder.unlink()
    folder.symlink_to(old.parent / "elsewhere")
    check_usable(old, resume=True, overwrite=False)


def run_steps(
    monkeypatch, log: Log, *, signals: dict[int | str, signal.Signals], finite: bool = True, rows: list | None = None
) -> list[int]:
    """Five steps that do nothing but raise these signals, in steps by number and in the evaluations after steps 2, 4
    and (`evaluation 6`) 5; returns the steps after which a checkpoint was saved.

    rows  takes the lines of the log of metrics
    """
    saved: list[int] = []
    engine = SimpleNamespace(world_size=1, rank=0, device=torch.device("cpu"), finite=finite, all_reduce_sum=None)
    config = tiny_config(train={"steps": 5, "log_every": 100, "eval_every": 2})
    evaluations = iter(range(2, 99, 2))

    def evaluate(*rest, check, **options) -> tuple[dict, dict, dict]:
        step = next(evaluations)
        for number in [signals[f"evaluation {step}"]] if f"evaluation {step}" in signals else []:
            signal.raise_signal(number)
        check()
        return {}, {}, {}

    def train_step(engine, batches, *rest):
        for number in [signals[batches]] if batches in signals else []:
            signal.raise_signal(number)

    monkeypatch.setattr(loop, "train_step", train_step)
    nothing = dict.fromkeys(("poll", "finish", "close"), lambda: None)
    writer = SimpleNamespace(**nothing, start=lambda done, state: saved.append(done) or [])
    monkeypatch.setattr(loop, "_losses", lambda *rest: {"loss": 1.0})
    monkeypatch.setattr(loop, "_gradients", lambda *rest: {})
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "describe_skipped", lambda *rest: "step {}, the {}-th in a row".format(*rest[-2:]))
    monkeypatch.setattr(log, "step", (rows if rows is not None else []).append)
    loader = SimpleNamespace(step=lambda step: step + 1)
    totals = SimpleNamespace(state=dict, skipped=3, in_a_row=2)
    with StopSignal() as stop:
        loop._steps(config, Path("run"), engine, loader, SimpleNamespace(fingerprint=""), log, stop, totals, 0, writer)
    return saved


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_after_the_step_in_progress_and_stops(monkeypatch, number):
    before, log = [signal.getsignal(one) for one in SIGNALS], Log()
    assert {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT} == set(SIGNALS)
    assert run_steps(monkeypatch, log, signals={3: number}) == [3]
    assert log.messages == [
        "stopped by a signal after step 3 of 5, checkpoint saved; continue: sgtm train run --resume"
    ]
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("evaluation", "done", "steps"), [(2, 2, [2]), (4, 4, [4]), (6, 5, [5])])
def test_a_signal_ends_an_evaluation_and_saves_once(monkeypatch, number, evaluation: int, done: int, steps: list[int]):
    """The last one too, whose checkpoint is in place by then: a stopped quickstart would evaluate and report it."""
    log = Log()
    assert run_steps(monkeypatch, log, signals={f"evaluation {evaluation}": number}) == steps
    where = f"in the evaluation after step {done} of 5"
    assert log.messages == [f"stopped by a signal {where}, checkpoint saved; continue: sgtm train run --resume"]
    assert log.evaluated == [step for step in (2, 4) if step < done]


def test_a_signal_in_the_last_step_ends_its_evaluation(monkeypatch):
    log = Log()
    assert run_steps(monkeypatch, log, signals={5: signal.SIGTERM}) == [5]
    assert log.messages[0].startswith("stopped by a signal in the evaluation after step 5 of 5")


def test_ranks_agree_to_end_an_evaluation():
    """Where a signal has reached another one."""
    with StopSignal() as stop:
        alone = SimpleNamespace(world_size=2, all_reduce_sum=lambda flag: flag)
        stop.check(alone)
        other = SimpleNamespace(world_size=2, all_reduce_sum=lambda flag: flag + 1)
        with pytest.raises(Stopped) as stopped:
            stop.check(other)
    assert stopped.value.status == 128 + signal.SIGTERM


def test_a_second_ctrl_c_interrupts_at_once():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a scheduler repeats itself; only a person is in a hurry


def test_a_gradient_that_is_not_finite_is_said(monkeypatch):
    log = Log()
    assert run_steps(monkeypatch, log, signals={}, finite=False) == [5]
    assert log.messages[:2] == ["step 0, the 2-th in a row", "step 1, the 2-th in a row"]
    log, rows = Log(), []
    run_steps(monkeypatch, log, signals={}, rows=rows)
    assert len(log.messages) == 1 and rows[0]["skipped_steps"] == 3


def certified_by(run: Path, corpus: Corpus, before: list[str] | None) -> tuple[str, ...]:
    """What the checkpoints of a certified run on this corpus are to carry.

    before  resume from a checkpoint that carries this
    """
    certificates = []
    settings = {"masking": {"joint": "strict"}, "optimizer": {"grad_clip_scope": "owner"}, "channel": {}}
    config = config_for(mixing="token", **settings)
    if before is not None:
        run.mkdir()
        facts = {"step": 3, "ranks": 1, "corpus": "", "config": {}, "files": {"weights": {"bytes": 1, "sha256": ""}}}
        write_manifest(run, {**facts, "independent_of": before})
    module = SimpleNamespace(backend="torch", parameters=lambda: [])
    engine = SimpleNamespace(
        module=module, device="cpu", rank=0, world_size=1, accumulation=1, set_weights=len, stop_if=callable
    )

    class Metrics(Log):
        sync = None

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...

    stubs = {
        "find_whole": run,
        "check_kernels": [],
        "_initial_model": (None, {}),
        "Engine": engine,
        "dry_run": None,
        "open_everywhere": corpus,
        "Loader": None,
        "StepTotals": SimpleNamespace(restore=lambda *rest: None),
        "load_checkpoint": (3, [], ""),
        "MetricsLog": Metrics(),
        "begin": set(),
        "_steps": None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, result in stubs.items():
            patch.setattr(loop, name, lambda *args, result=result, **options: result)
        patch.setattr(loop, "CheckpointWriter", lambda *args: certificates.append(args[4]))
        loop._train(config, SimpleNamespace(world_size=1, rank=0), run, before is not None, False)
    return certificates[0]


def test_checkpoints_are_certified_as_config_corpus_and_checkpoint_allow(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    two = [fields for fields in mixed_records(20) if fields["category"] != "web"]
    labels = {"en": "retain", "es": "forget:es"}
    plain = build(tmp_path / "plain", two, labels)
    assert certified_by(tmp_path / "new", plain, before=None) == ("es",)
    assert certified_by(tmp_path / "resumed", plain, before=["es"]) == ("es",)
    assert certified_by(tmp_path / "was not", plain, before=[]) == ()  # as with kernels.deterministic: false
    unlabeled = build(tmp_path / "unlabeled", mixed_records(20))
    assert certified_by(tmp_path / "a", unlabeled, before=None) == ()
    spans = build(tmp_path / "spans", [*two, record(999, "en", spans=[[0, 4, "es"]])], labels)
    assert certified_by(tmp_path / "b", spans, before=None) == ()
    assert certified_by(tmp_path / "c", spans, before=["es"]) == ()


def test_the_warm_up_of_compiled_kernels_is_told():
    config = tiny_config()
    for backend, expected in (("triton", 1), ("torch", 0)):
        module = SimpleNamespace(backend=backend, parameters=lambda: [])
        engine = SimpleNamespace(module=module, world_size=1, accumulation=1)
        assert loop._arithmetic(config, engine, 0, 41.4).count("\nkernels ready after 41 s") == expected


def test_a_run_prints_its_strategy_and_recipe():
    module = SimpleNamespace(backend="torch", parameters=lambda: [])
    engine = SimpleNamespace(module=module, world_size=1, accumulation=1)
    for options, expected in (([], "strategy sgtm, kernels"), (["--recipe=dual"], "gradient_routing, recipe dual, k")):
        config = load_config("debug", options).for_ranks(1)
        assert expected in loop._arithmetic(config, engine, 0, 0.0)
