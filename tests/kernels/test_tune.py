"""The tuner: what it tries, how it decides, what it writes."""

import json
from itertools import pairwise

import pytest
import torch
from tunables import LONG, SMALL, TUNABLES, in_the_interpreter

from sgtm_kernels.linear import kernel as linear_kernel
from sgtm_kernels.linear import rectangles, scaling
from sgtm_kernels.mlp import kernel as mlp_kernel
from sgtm_kernels.tools import tune
from sgtm_kernels.tools.shapes import SHAPES


def test_the_choice_needs_more_than_noise():
    a, b, c = (mlp_kernel.Tile(i, i, i) for i in (1, 2, 3))
    base = [10.0] * 10
    often, mostly, always = [9.0] * 8 + [20.0] * 2, [5.0] * 7 + [10.1] * 3, [9.5] * 10
    assert tune.decide([a, b], [base, mostly]) == tune.Decision(a, 10.0, 10.0)
    assert tune.decide([a, b], [base, often]) == tune.Decision(b, 9.0, 10.0)
    assert tune.decide([a, b, c], [base, always, often]) == tune.Decision(c, 9.0, 10.0)
    assert tune.decide([a, b], [base, base]).config == a
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]  # paired: half the time in every round, whatever the round
    assert tune.decide([a, b], [drift, [t / 2 for t in drift]]) == tune.Decision(b, 2.0, 4.0)


class FakeClock:
    """Calls everything once; then a configuration takes as long as `seconds` says, others 1 s."""

    def __init__(self, seconds: dict[str, float]):
        self.answers, self.compared = seconds, []

    def rounds(self, calls, rounds, seconds):
        self.compared.append(list(calls))
        for call in calls.values():
            call()
        return {name: [self.answers.get(name, 1.0)] * rounds for name in calls}


@in_the_interpreter
@pytest.mark.slow
def test_the_tuner_decides_every_choice_once(others):
    tile, algorithm = rectangles.Tile(16, 16, 16, 4, 1), linear_kernel.DwAlgorithm("rectangles")
    clock, decisions, lines = FakeClock({str(tile): 0.5, str(algorithm): 0.9}), {}, []
    for call in tune.CASES["linear"](LONG, torch.device("cpu"), torch.float32):
        tune.tune_call(call, clock, decisions, 5, 1.0, lines.append)
    names = [choice[0] for choice in decisions]
    assert names == ["linear_sums", "dw_rectangles", "linear_dw"]  # the tile of an algorithm before the algorithm
    assert [f.config for f in decisions.values()] == [scaling.TILE.heuristic("fp32"), tile, algorithm]
    decision = decisions["linear_dw", ("fp32", 4, 64)]
    assert (decision.p50, decision.heuristic_p50) == (0.9, 1.0)
    assert len(lines) == len(clock.compared) == 3 and all(len(names) == 2 for names in clock.compared)


def test_a_candidate_that_does_not_fit_the_device_is_left_out(others, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def call():
        if TUNABLES["activation_forward"](torch.device("cpu"), "fp32", "plain") == SMALL:
            raise OutOfResources(300_000, 232_448, "shared memory")

    ((choice, candidates, needed),) = tune.choices(call)
    assert (choice, needed) == (("activation_forward", ("fp32", "plain")), {})
    assert candidates == [mlp_kernel.Tile(32, 64, 4)]


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch, others):
    path, choice = tmp_path / "folder" / "t.json", ("activation_forward", ("fp32", "plain"))
    assert tune.entries_of(path, "T0") == {}
    tune.write(
        path,
        "T0",
        {"token_losses": {"bf16 8192": {"config": {"block": 8192, "warps": 32}}}},
        {choice: tune.Decision(SMALL, 5e-6, 7e-6)},
        tune.provenance(),
    )
    entry = json.loads(path.read_text())["entries"]["activation_forward"]["fp32 plain"]
    assert entry["p50_microseconds"] == 5 and entry["heuristic_p50_microseconds"] == 7
    assert {"torch", "triton", "driver", "commit", "date"} <= set(entry) and entry["torch"] == torch.__version__
    assert list(path.parent.iterdir()) == [path]
    earlier_entries = tune.entries_of(path, "T0")
    tune.write(path, "T0", earlier_entries, {choice: tune.Decision(mlp_kernel.Tile(32, 64, 4), 6e-6, 6e-6)}, {})
    again = json.loads(path.read_text())["entries"]
    assert set(again) == {"token_losses", "activation_forward"}
    assert again["activation_forward"]["fp32 plain"]["config"]["tokens"] == 32
    with pytest.raises(ValueError, match=r"table of T0, this is T1"):
        tune.entries_of(path, "T1")
    monkeypatch.setenv("SGTM_TUNED", str(path))
    assert TUNABLES["activation_forward"](torch.device("cpu"), "fp32", "plain") == mlp_kernel.Tile(32, 64, 4)


def test_without_a_gpu_it_refuses(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--table", str(tmp_path / "t.json")]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    for arguments, message in ((["--only", "norm"], "unknown op 'norm'"), (["--shape", "1b"], "unknown shape '1b'")):
        assert tune.main(arguments) == 1
        assert message in capsys.readouterr().err


def test_a_table_that_cannot_be_written_is_known_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA T0")
    monkeypatch.setattr(tune, "CASES", {"mlp": lambda *args: pytest.fail("measured")})
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert tune.main(["--table", str(folder / "t.json")]) == 1
        assert str(tmp_path / "file") in capsys.readouterr().err
    monkeypatch.setattr(tune, "CASES", {"mlp": lambda *args: []})
    assert tune.main(["--table", str(tmp_path / "new" / "t.json"), "--commit", "v1"]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.json"]


@in_the_interpreter
def test_the_table_has_every_choice_at_once_and_resuming_measures_the_others(tmp_path, monkeypatch, others):
    """Stopped by an exception after the first choice, as by a kill."""
    path, seen, timed = tmp_path / "t.json", [], []

    class Clock(FakeClock):
        def __init__(self, device):
            super().__init__({str(SMALL): 0.5})

        def rounds(self, calls, rounds, seconds):
            timed.append(list(calls))
            return super().rounds(calls, rounds, seconds)

    def entries() -> dict:
        return json.loads(path.read_text())["entries"]

    def stop(choice, result):
        assert entries()[choice[0]]["fp32 plain"]["config"] == SMALL._asdict() == result.config._asdict()
        seen.append(choice)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "Clock", Clock)
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "resume": True}
    options |= {"decided": stop, "report": lambda text: None}
    with pytest.raises(KeyboardInterrupt):
        tune.tune(["mlp"], ["tiny"], path, "v1", **options)
    assert set(entries()) == {"activation_forward"}
    tune.tune(["mlp"], ["tiny"], path, "v2", **options)
    assert set(entries()) == {"activation_forward", "activation_backward"} and len(timed) == 2
    assert [entries()[name]["fp32 plain"]["commit"] for name in sorted(entries())] == ["v2", "v1"]
    changed = entries()
    changed["activation_forward"]["fp32 plain"]["config"]["tokens"] = 3  # of another version
    path.write_text(json.dumps({"device": tune.cpu_model(), "entries": changed}))
    tune.tune(["mlp"], ["tiny"], path, "v3", **options)
    assert len(timed) == 3 and entries()["activation_forward"]["fp32 plain"]["commit"] == "v3"


@pytest.mark.parametrize(("quarters", "length"), [(1, 24), (2, 7), (3, 5), (1, 64)])
def test_spread(quarters, length):
    plan = tune.spread(SHAPES["tiny"] if length < 10 else LONG, quarters, length)
    (first, *_), forget = plan.label_runs, sum(run.end - run.start for run in plan.label_runs if run.label == 2)
    assert first.end == length and all(a.end == b.start for a, b in pairwise(plan.label_runs))
    assert forget / plan.tokens == pytest.approx(quarters / 4, abs=0.25 if plan.tokens < 100 else 0.06)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tuning_on_the_gpu(tmp_path):
    path = tune.tune(["mlp"], ["tiny"], tmp_path / "t.json", "test", rounds=3, seconds=0.5)
    assert set(json.loads(path.read_text())["entries"]) == {"activation_forward", "activation_backward"}
