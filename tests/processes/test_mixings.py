"""Rows of the benchmark of training steps: ratios of the same round, tokens/s, targets, and what was not measured."""

import json
import sys

import pytest
import torch

CPU = torch.device("cpu")
tiny_shapes = pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
pytestmark = pytest.mark.usefixtures("benchmarks")


def test_what_fails_is_a_row_and_the_rest_is_measured(tmp_path, monkeypatch):
    """A model that does not fit, a mask that runs out of memory, and a plain model that does not compile."""
    import steps

    from sgtm.measure import mixings
    from sgtm.measure.models import SETTINGS

    original = mixings.Ours.step

    def step(self, backend, tables, batches):
        if 2 in batches[0].labels and 0 not in batches[0].labels:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        original(self, backend, tables, batches)

    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(mixings.Ours, "step", step)
    monkeypatch.setattr(mixings, "PlainSteps", broken)
    monkeypatch.setitem(SETTINGS, "254m", broken)
    to = tmp_path / "new" / "steps.jsonl"
    options = ["--shape", "254m,tiny", "--device", "cpu", "--rounds", "1", "--backend", "torch", "--json", str(to)]
    monkeypatch.setattr(sys, "argv", ["steps.py", *options])
    assert steps.main() == 0
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    errors = {(r["shape"], r["row"]): r["error"] for r in rows if "error" in r}
    memory = "OutOfMemoryError: CUDA out of memory."
    assert errors == {
        ("254m", "all"): "RuntimeError: no compiler",
        ("tiny", "plain PyTorch"): "RuntimeError: no compiler",
        **{("tiny", row): memory for row in ("pure forget", "5 %, step", "25 %, step", "25 %, micro", "5 %, micro")},
    }
    good = {r["row"] for r in rows} - {row for _, row in errors}
    assert good == {"none", "nothing masked", "25 %, sequence", "5 %, sequence", "none, micro", "nothing masked, micro",
                    "none, token", "5 %, token", "25 %, token"}  # fmt: skip
    from report import steps as table

    assert "Not measured: 254m, all: RuntimeError: no compiler; tiny, torch, pure forget: Out" in table(rows)


def test_rows_are_on_the_disk_when_the_run_is_killed(tmp_path, monkeypatch):
    import steps

    from sgtm.measure.mixings import MixingSweep

    def killed(self, rounds, seconds):
        yield [{"row": "none", "error": "one"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(MixingSweep, "rows", killed)
    to = tmp_path / "steps.jsonl"
    monkeypatch.setattr(sys, "argv", ["steps.py", "--device", "cpu", "--backend", "torch", "--json", str(to)])
    with pytest.raises(KeyboardInterrupt):
        steps.main()
    assert json.loads(to.read_text())["shape"] == "tiny"


@tiny_shapes
def test_a_row_is_a_step_against_the_unmasked_one_of_the_same_round(name, monkeypatch):
    """Two rounds, the second at half the speed: ratios do not see it. CPU time is a tenth, and half of it for masks."""
    from sgtm.measure import mixings
    from sgtm.measure.models import SETTINGS
    from sgtm.measure.rounds import Rounds, Took
    from sgtm.measure.rows import GPU_TARGETS

    seconds = {"none": 4.0, "pure forget": 2.0, "nothing masked, micro": 8.0, "25 %, micro": 4.0, "none, micro": 16.0}

    def two_rounds(steps, *args, **options):
        rounds = Rounds()
        for key in steps:
            wall = {mixings.PLAIN: 2.0, mixings.MATMUL: 1.0}.get(key) or seconds.get(key[1], 4.0)
            cpu = wall / (20 if isinstance(key, tuple) and not key[1].startswith("none") else 10)
            rounds.took[key] = [Took(wall, cpu), Took(2 * wall, 3 * cpu)]
            rounds.peaks[key] = [1.0]
        return rounds

    monkeypatch.setattr(mixings, "take_rounds", two_rounds)
    setting = SETTINGS[name]()
    measured = mixings.MixingSweep(name, setting, CPU, torch.float32, ["torch"])
    measured.targets = GPU_TARGETS
    rows = {r["row"]: r for group in measured.rows(2, 1) for r in group}
    wanted = {"nothing masked": 1, "pure forget": 0.5, "25 %, step": 0.875, "25 %, micro": 0.25,
              "nothing masked, micro": 0.5, "5 %, micro": 0.45, "plain PyTorch": 0.5}  # fmt: skip
    assert {row: rows[row]["ratio"]["p50"] for row in wanted} == pytest.approx(wanted)
    assert all(rows[row]["ratio"]["p20"] == rows[row]["ratio"]["p80"] for row in wanted)
    cpu = {row: ratio if row == "plain PyTorch" else ratio / 2 for row, ratio in wanted.items()}
    assert {row: rows[row]["cpu_ratio"]["p80"] for row in wanted} == pytest.approx(cpu)
    tokens, micro = rows["none"]["tokens"], rows["none, micro"]["tokens"]
    assert tokens == setting.sequences * setting.model.context
    assert micro == 4 * setting.micro_batch * setting.model.context
    assert rows["none, micro"]["ratio"]["p50"] == pytest.approx(4 * tokens / micro, rel=1e-4)
    speed = tokens / 6.0  # the median of 4 and 8 seconds
    assert rows["none"]["tokens_per_second"] == pytest.approx(speed, abs=0.1)
    assert rows["plain PyTorch"]["tokens_per_second"] == pytest.approx(2 * speed, abs=0.1)
    assert rows["25 %, micro"]["tokens_per_second"] == pytest.approx(speed * micro / tokens, rel=0.01)
    expected = measured.flops * tokens / 4.0 / measured.matmul_flops
    assert rows["none"]["flops_utilisation"] == pytest.approx(expected, rel=1e-4)
    verdicts = {row: (r["target"], r["missed"]) for row, r in rows.items()}
    assert verdicts["none"] == verdicts["none, token"] == verdicts["plain PyTorch"] == (None, None)
    assert verdicts["nothing masked"] == ("time <= 1.00", False)
    assert (verdicts["25 %, token"], verdicts["25 %, micro"]) == (("time <= 0.96", True), ("time <= 0.96", False))


def test_a_missed_target_is_marked():
    import numpy as np

    from sgtm.measure.rounds import Sample
    from sgtm.measure.rows import Target, as_parent, row, table

    base = Sample(np.array([2.0, 2.0]), np.array([1.0, 1.0]), 100, 1.0)
    slow = Sample(np.array([3.0, 3.0]), np.array([1.1, 1.1]), 100, 2.0)
    none = row("none", base, None)
    parent = as_parent(none, base)
    cases = [
        (Target("cpu_ratio", 1.01), True, "CPU <= 1.01: MISSED"),
        (Target("cpu_ratio", 1.1), False, "CPU <= 1.10: met"),
        (Target("ratio", 1.8, at_least=True), True, "time >= 1.80: MISSED"),
        (Target("tokens_per_second", 30, at_least=True), False, "tokens/s >= 30.00: met"),
    ]
    for target, missed, text in cases:
        masked_row = row("masked", slow, parent, target)
        assert masked_row["missed"] is missed and text in table([none, masked_row])
        assert masked_row["tokens_per_second"] == pytest.approx(50 / 1.5, abs=0.1)


def test_tokens_per_second_agree_with_the_ratio_whatever_the_machine_did():
    """Steps of 1 and 4 seconds take 0.5 and 1 of the unmasked ones: 3/4 of the time, although their median is 5/6."""
    import numpy as np

    from sgtm.measure.rounds import Sample
    from sgtm.measure.rows import as_parent, row

    base, other = (Sample(np.array(wall), np.array(wall), 100, 1.0) for wall in ([2.0, 4.0], [1.0, 4.0]))
    none = row("none", base, None)
    masked_row = row("masked", other, as_parent(none, base))
    assert (none["tokens_per_second"], masked_row["tokens_per_second"]) == (33.3, pytest.approx(33.3 / 0.75, abs=0.1))


def test_steps_that_do_not_train_are_not_reported():
    from sgtm.measure.mixings import MixingSweep
    from sgtm.measure.models import SETTINGS

    steps = MixingSweep("tiny-llama", SETTINGS["tiny-llama"](), CPU, torch.float32, ["torch"])
    with torch.no_grad():
        steps.ours.mixed.masters["blocks.1.mlp_norm.weight"].fill_(float("nan"))
    rows = next(steps.rows(1, 1))
    assert len(rows) > 5 and all(r["error"] == "loss nan: these steps do not train" for r in rows)


def test_rows_of_a_group_are_written_before_the_next_is_measured(tmp_path, monkeypatch):
    import steps

    to, counts = tmp_path / "steps.jsonl", []

    class MixingSweep:
        def __init__(self, *args):
            pass

        def rows(self, rounds, seconds):
            for name in "abc":
                yield [{"row": name, "error": "not measured"}]
                counts.append(len(to.read_text().splitlines()))

    monkeypatch.setattr(steps, "MixingSweep", MixingSweep)
    options = ["--shape", "tiny", "--device", "cpu", "--backend", "torch", "--json", str(to)]
    monkeypatch.setattr(sys, "argv", ["steps.py", *options])
    steps.main()
    assert counts == [1, 2, 3]
