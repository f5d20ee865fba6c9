"""The benchmark of whole training steps, on a CPU at tiny shapes: same work on both sides, and no more than the masks
leave.

Faults tried, each seen to fail: every key live; live rows copied from the master weights in part; gradients of the last
micro-batch alone, or kept for the next step; the strategy, the backend, the documents or the mixing of another row; the
weights of a mean exchanged; a share of forget documents for another; a ratio upside down, to another base, or of steps
for tokens; the first round's rate for all; the target of a masked row on `none`; a default, the joint setting or the
window of a shape; positions counted as parameters; an import of rich or pydantic; other tokens under another mask; a
loss of NaN let through; full-size shapes on a CPU where none is named.
"""

import json
import sys
from itertools import pairwise, product

import pytest
import torch
from bare import ABSENT, environment_without, execute

from sgtm.config import load_config, preset_names
from sgtm.config.schema import ModelConfig
from sgtm.model.rows import live_keys

CPU = torch.device("cpu")
tiny_shapes = pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
pytestmark = pytest.mark.usefixtures("benchmarks")


def taken(setting, ours, name: str) -> frozenset[str]:
    """One step of this case; returns the keys that it may update."""
    from sgtm.bench.cases import cases, random_batches

    case = cases(setting)[name]
    batches = random_batches(case.batches, setting.model, CPU)
    ours.step("runs", case.tables, batches)
    return live_keys(case.tables, batches[0].step_labels)


def test_every_step_is_timed_on_a_bare_machine(tmp_path):
    from sgtm.bench.cases import cases
    from sgtm.bench.models import SETTINGS

    absent, to = set(ABSENT) - {"sgtm"}, tmp_path / "steps.jsonl"
    to.write_text('{"row": "of before"}\n')
    options = ["--device", "cpu", "--rounds", "3", "--backend", "runs", "--json", str(to)]
    command = [sys.executable, "benchmarks/steps.py", "--shape", "tiny,tiny-llama", *options]
    done = execute(command, environment_without(absent, tmp_path))
    assert done.returncode == 0, done.stderr
    before, *rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert before == {"row": "of before"}
    for shape in ("tiny", "tiny-llama"):
        names = [r["row"] for r in rows if r["shape"] == shape]
        assert sorted(names) == sorted(["plain PyTorch", *cases(SETTINGS[shape]())]) and names[0] == "none"
    speeds = {(r["shape"], r["row"]): r["tokens_per_second"] for r in rows}
    for r in rows:
        spreads = [r[key] for key in ("wall", "cpu", "ratio", "cpu_ratio") if key in r]
        assert all(0 < s["p20"] <= s["p50"] <= s["p80"] < float("inf") for s in spreads)
        assert r["peak_mib"] > 0 and r["rounds"] == 3 and r["commit"] is not None and r["flops_utilisation"] > 0
        assert ("ratio" in r) == ("cpu_ratio" in r) == ("memory_ratio" in r) == (r["row"] != "none")
        assert (r["backend"] == "public") == (r["row"] == "plain PyTorch") and r["target"] is None
        if r["of"]:  # tokens/s and ratios of any two rows agree
            assert speeds[r["shape"], r["of"]] / r["tokens_per_second"] == pytest.approx(r["ratio"]["p50"], rel=1e-3)
    from report import steps

    assert steps(rows).count("\n|") == len(rows) + 2 and "| CPU time | to plain | MFU | peak MiB |" in steps(rows)


def test_the_default_shapes_are_tiny_on_a_cpu_alone(monkeypatch, capsys):
    import steps

    taken = []
    monkeypatch.setattr(steps, "measure", lambda name, *args: taken.append(name) or [])
    for options, expected in (("", ["tiny"]), ("--shape 124m", ["124m"]), ("--device cuda", list(steps.SHAPES))):
        taken.clear()
        with monkeypatch.context() as here:
            here.setattr(torch.cuda, "is_available", lambda options=options: "cuda" in options)
            here.setattr(torch.cuda, "empty_cache", lambda: None)
            here.setattr(sys, "argv", ["steps.py", *options.split()])
            assert steps.main() == 1  # nothing was measured
        assert taken == expected
        assert ("--shape tiny, because this is a CPU" in capsys.readouterr().out) == (not options)


def test_what_fails_is_a_row_and_the_rest_is_measured(tmp_path, monkeypatch):
    """A model that does not fit, a mask that runs out of memory, and a plain model that does not compile."""
    import steps

    from sgtm.bench import sweep
    from sgtm.bench.models import SETTINGS

    original = sweep.Ours.step

    def step(self, backend, tables, batches):
        if 2 in batches[0].labels and 0 not in batches[0].labels:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        original(self, backend, tables, batches)

    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(sweep.Ours, "step", step)
    monkeypatch.setattr(sweep, "PlainSteps", broken)
    monkeypatch.setitem(SETTINGS, "254m", broken)
    to = tmp_path / "new" / "steps.jsonl"
    options = ["--shape", "254m,tiny", "--device", "cpu", "--rounds", "1", "--backend", "runs", "--json", str(to)]
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

    assert "Not measured: 254m, all: RuntimeError: no compiler; tiny, runs, pure forget: Out" in table(rows)


def test_rows_are_on_the_disk_when_the_run_is_killed(tmp_path, monkeypatch):
    import steps

    from sgtm.bench.sweep import Sweep

    def killed(self, rounds, seconds):
        yield [{"row": "none", "error": "one"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(Sweep, "rows", killed)
    to = tmp_path / "steps.jsonl"
    monkeypatch.setattr(sys, "argv", ["steps.py", "--device", "cpu", "--backend", "runs", "--json", str(to)])
    with pytest.raises(KeyboardInterrupt):
        steps.main()
    assert json.loads(to.read_text())["shape"] == "tiny"


@tiny_shapes
def test_a_row_is_a_step_against_the_unmasked_one_of_the_same_round(name, monkeypatch):
    """Two rounds, the second at half the speed: ratios do not see it. CPU time is a tenth, and half of it for masks."""
    from sgtm.bench import sweep
    from sgtm.bench.models import SETTINGS
    from sgtm.bench.rounds import Rounds, Took
    from sgtm.bench.targets import GPU

    seconds = {"none": 4.0, "pure forget": 2.0, "nothing masked, micro": 8.0, "25 %, micro": 4.0, "none, micro": 16.0}

    def two_rounds(steps, *args, **options):
        found = Rounds()
        for key in steps:
            wall = {sweep.PLAIN: 2.0, sweep.MATMUL: 1.0}.get(key) or seconds.get(key[1], 4.0)
            cpu = wall / (20 if isinstance(key, tuple) and not key[1].startswith("none") else 10)
            found.took[key] = [Took(wall, cpu), Took(2 * wall, 3 * cpu)]
            found.peaks[key] = [1.0]
        return found

    monkeypatch.setattr(sweep, "take_rounds", two_rounds)
    setting = SETTINGS[name]()
    measured = sweep.Sweep(name, setting, CPU, torch.float32, ["runs"])
    measured.targets = GPU
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

    from sgtm.bench.rounds import Sample
    from sgtm.bench.rows import Target, as_parent, row, table

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
        found = row("masked", slow, parent, target)
        assert found["missed"] is missed and text in table([none, found])
        assert found["tokens_per_second"] == pytest.approx(50 / 1.5, abs=0.1)


def test_steps_that_do_not_train_are_not_reported():
    from sgtm.bench.models import SETTINGS
    from sgtm.bench.sweep import Sweep

    steps = Sweep("tiny-llama", SETTINGS["tiny-llama"](), CPU, torch.float32, ["runs"])
    with torch.no_grad():
        steps.ours.mixed.masters["blocks.1.mlp_norm.weight"].fill_(float("nan"))
    rows = next(steps.rows(1, 1))
    assert len(rows) > 5 and all(r["error"] == "loss nan: these steps do not train" for r in rows)


def test_model_flops():
    """By hand: 6 N + 12 H Q times the keys of two layers, of which the second sees 16."""
    from sgtm.bench.models import TINY_LLAMA, preset

    assert preset("debug", 1, 1).model.flops_per_token(1000) == 6000 + 12 * 32 * (64 + 16)
    assert TINY_LLAMA.flops_per_token(10) == 60 + 12 * 24 * 64 * 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # qkv, out, MLP, norms of two layers; final norm; tied head
        ("tiny", 2 * (96 * 32 + 33 * 32 + 2 * 64 * 32 + 64 + 32 + 4 * 32) + 64 + 512 * 32),
        ("tiny-llama", 2 * (48 * 24 + 24 * 24 + 3 * 40 * 24 + 2 * 24) + 24 + 97 * 24),
    ],
)
def test_the_parameters_that_count(name, parameters):
    """Positions do not, nor an embedding that is not the head."""
    from sgtm.bench.models import SETTINGS
    from sgtm.bench.sweep import Sweep

    steps = Sweep(name, SETTINGS[name](), CPU, torch.float32, ["runs"])
    assert steps.flops == SETTINGS[name]().model.flops_per_token(parameters)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "124m", "254m", "llama-1b"])
def test_every_share_in_every_mixing_mode_once(name):
    from sgtm.bench.cases import Case, cases, random_batches
    from sgtm.bench.models import SETTINGS

    setting = SETTINGS[name]()
    found = cases(setting)
    masked = [case for key, case in found.items() if not key.startswith("none")]
    modes = [(case.percent, mode) for case in masked for mode in case.mixing]
    assert set(modes) == set(product((0, 5, 25, 100), ("step", "micro", "sequence", "token")))
    steps = [(id(case.tables), case.batches) for case in found.values() if isinstance(case, Case)]
    assert len(set(steps)) == len(steps)

    def share(case) -> float:
        if not isinstance(case, Case):
            assert sum(case.weights.values()) == pytest.approx(1)
            return sum(weight * share(found[part]) for part, weight in case.weights.items())
        pieces = [(label, n) for batch in case.batches for label, n in zip(batch.labels, batch.lengths, strict=True)]
        assert sum(n for _, n in pieces) == len(case.batches) * setting.micro_batch * setting.model.context
        return sum(n for label, n in pieces if label == 2) / sum(n for _, n in pieces)

    tokens = {
        key: random_batches(case.batches, setting.model, CPU) for key, case in found.items() if isinstance(case, Case)
    }
    for key, batches in tokens.items():
        for got, want in zip(batches, tokens[found[key].of], strict=True):
            assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.targets, want.targets)

    for case in found.values():
        assert share(case) == pytest.approx(case.percent / 100, abs=0.005 if "token" in case.mixing else 1e-9)
        base = found[case.of]
        parts = [case] if isinstance(case, Case) else [found[part] for part in case.weights]
        for part in parts:  # the same micro-batches and documents, whatever the labels
            assert [(sum(b.lengths), b.documents) for b in part.batches] == [
                (sum(b.lengths), b.documents) for b in base.batches
            ]


@tiny_shapes
def test_labels_change_where_the_mixing_mode_says(name):
    from sgtm.bench.cases import cases
    from sgtm.bench.models import SETTINGS

    setting = SETTINGS[name]()
    found = cases(setting)
    assert [set(b.labels) for b in found["25 %, micro"].batches] == [{2}, {0}, {0}, {0}]
    assert {2, 0} in [set(b.labels) for b in found["25 %, sequence"].batches]
    for batch in found["5 %, token"].batches:
        ends = {end for _, end in batch.documents}
        context = setting.model.context
        assert ends >= set(range(context, setting.micro_batch * context + 1, context))
        assert [end - start for start, end in batch.documents] == list(batch.lengths)
        first = batch.labels[: len(batch.labels) // setting.micro_batch]
        assert set(first) == {0, 2} and len({batch.labels[i::5] for i in range(5)}) > 1


def test_shapes_are_those_of_the_presets():
    from dataclasses import asdict

    from sgtm.bench.models import ModelShape, preset

    fields = {name: field.get_default() for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    assert {f.name: f.default for f in ModelShape.__dataclass_fields__.values() if f.name in fields} == fields
    for name in preset_names():
        config = load_config(name, [])
        got, want = preset(name, 3, 2), config.model
        assert asdict(got.model) == want.model_dump() | {"activation_checkpointing": False}
        assert (got.model.num_kv_heads, got.model.size_per_head) == (want.num_kv_heads, want.size_per_head)
        assert [got.model.window_of(i) for i in range(9)] == [want.window_of(i) for i in range(9)]
        assert got.partition.layers == config.partition.layers and got.joint == config.masking.joint
        assert (got.sequences, got.model.flops_per_token(0) > 0) == (6, True)


@tiny_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pure_forget_step_touches_forget_rows_alone(name, dtype, ours):
    """Master weights, moments and parameters of everything else keep every bit; what it may learn changes."""
    setting, trained = ours(name, dtype)
    taken(setting, trained, "none")
    state = trained.optimizer.state

    def everything():
        return {
            key: [t.clone() for t in (master, *state[master].values(), trained.mixed.parameters[key].detach())]
            for key, master in trained.mixed.masters.items()
        }

    before = everything()
    live = taken(setting, trained, "pure forget")
    after, rows, frozen = everything(), trained.mixed.model.parameter_rows(), 0
    for key, layout in rows.items():
        for owner, (start, end) in zip(layout.keys, pairwise(layout.bounds), strict=True):
            pairs = [(x[start:end], y[start:end]) for x, y in zip(before[key], after[key], strict=True)]
            if owner in live:
                assert not torch.equal(*pairs[0]) and not torch.equal(*pairs[1])
            else:
                frozen += 1
                assert all(torch.equal(x, y) for x, y in pairs), (key, owner)
    assert frozen > setting.model.layers * 4
    assert "attn_in.retain" not in live and "attn_in.forget" in live


@tiny_shapes
def test_gradients_of_micro_batches_add_up_in_fp32(name, ours):
    from sgtm.bench.cases import cases, random_batches

    setting, trained = ours(name, torch.bfloat16)
    case = cases(setting)["25 %, micro"]

    def gathered(batches) -> dict:
        trained.mixed.forget_gradients()
        for batch in batches:
            loss, _ = trained.mixed.model(batch.input_ids, batch.targets, batch.plan(case.tables), 1.0)
            loss.backward()
        return {key: master.grad for key, master in trained.mixed.masters.items()}

    batches = random_batches(case.batches, setting.model, CPU)
    first, second, both = gathered(batches[:1]), gathered(batches[1:2]), gathered(batches[:2])
    for key, got in both.items():
        assert got.dtype == torch.float32 and torch.equal(got, first[key] + second[key])


@tiny_shapes
def test_parameters_follow_their_master_weights(name, ours):
    setting, trained = ours(name, torch.bfloat16)
    for case in ("none", "pure forget", "25 %, micro", "25 %, token", "nothing masked"):
        taken(setting, trained, case)
        for key, master in trained.mixed.masters.items():
            assert torch.equal(trained.mixed.parameters[key], master.to(torch.bfloat16))
            assert master.grad is None and trained.mixed.parameters[key].grad is None
            assert torch.isfinite(master).all()


@pytest.mark.parametrize("case", ["25 %, sequence", "pure forget"])
def test_a_step_in_triton_is_that_of_runs(case, ours):
    """In the interpreter, kernels of the model and of AdamW; fp32."""
    from sgtm.bench.cases import cases, random_batches

    setting, trained = ours("tiny-llama")
    chosen = cases(setting)[case]
    tables, batches = chosen.tables, random_batches(chosen.batches, setting.model, CPU)
    _, other = ours("tiny-llama")
    other.step("triton", tables, batches)
    assert other.optimizer.backend == other.mixed.model.blocks[1].mlp.backend == "triton"
    trained.step("runs", tables, batches)
    torch.testing.assert_close(other.loss, trained.loss, rtol=1e-5, atol=0)
    for key, master in trained.mixed.masters.items():
        mean = other.optimizer.state[other.mixed.masters[key]]["exp_avg"]
        wanted = trained.optimizer.state[master]["exp_avg"]
        torch.testing.assert_close(mean, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
        assert (other.mixed.masters[key] - master).abs().max() <= 2e-4
