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
    from step_cases import cases, random_batches, tables_of

    case = cases(setting)[name]
    tables, batches = tables_of(setting, case.strategy), random_batches(setting, case.batches, CPU)
    ours.step("runs", tables, batches)
    return live_keys(tables, batches[0].step_labels)


def test_every_step_is_timed_on_a_bare_machine(tmp_path):
    from model_shapes import SETTINGS
    from step_cases import cases

    absent, to = set(ABSENT) - {"sgtm", "yaml"}, tmp_path / "steps.jsonl"
    options = ["--device", "cpu", "--rounds", "3", "--backend", "runs", "--json", str(to)]
    command = [sys.executable, "benchmarks/steps.py", "--shape", "tiny,tiny-llama", *options]
    done = execute(command, environment_without(absent, tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert [(r["shape"], r["row"]) for r in rows] == [
        (shape, row) for shape in ("tiny", "tiny-llama") for row in ("plain PyTorch", *cases(SETTINGS[shape]()))
    ]
    for r in rows:
        spreads = [r[key] for key in ("milliseconds", "flops_utilisation", "matmul_tflops", "ratio_public", "ratio")
                   if key in r]  # fmt: skip
        assert all(0 < s["p20"] <= s["p50"] <= s["p80"] < float("inf") for s in spreads)
        assert r["tokens_per_second"] > 0 and r["peak_mib"] > 0 and r["rounds"] == 3 and r["commit"] is not None
        assert ("ratio" in r) == ("memory_ratio" in r) == (r["backend"] == "runs") and "ratio_public" in r
        if r["row"] == r.get("of") or r["backend"] == "public":
            assert r["ratio" if "ratio" in r else "ratio_public"] == {"p20": 1, "p50": 1, "p80": 1}
        rate = r["tokens"] / r["milliseconds"]["p50"] * 1e3
        assert r["mean_of"] or r["tokens_per_second"] == pytest.approx(rate, rel=0.01)
    from report import steps

    assert steps(rows).count("\n|") == len(rows) + 2


def test_the_default_shapes_are_tiny_on_a_cpu_alone(monkeypatch, capsys):
    import steps

    taken = []
    monkeypatch.setattr(steps, "SETTINGS", {name: lambda name=name: taken.append(name) for name in steps.SETTINGS})
    monkeypatch.setattr(steps, "Steps", lambda *args: type("Nothing", (), {"measure": lambda self, *args: []})())
    monkeypatch.setattr(steps, "Roofline", lambda *args: None)
    monkeypatch.setattr(steps, "Clock", lambda device: None)
    monkeypatch.setattr(steps, "show", lambda *args: None)
    for options, expected in (("", ["tiny"]), ("--shape 124m", ["124m"]), ("--device cuda", list(steps.SHAPES))):
        taken.clear()
        with monkeypatch.context() as here:
            here.setattr(torch.cuda, "is_available", lambda options=options: "cuda" in options)
            here.setattr(torch.cuda, "empty_cache", lambda: None)
            here.setattr(sys, "argv", ["steps.py", *options.split()])
            assert steps.main() == 0
        assert taken == expected
        assert ("--shape tiny, because this is a CPU" in capsys.readouterr().out) == (not options)


@tiny_shapes
def test_a_row_is_a_step_against_the_unmasked_one_of_the_same_round(name, monkeypatch):
    """Two rounds, the second at half the speed: ratios and utilisation do not see it."""
    from model_shapes import SETTINGS
    from roofline import MATMUL, Roofline
    from steps import PLAIN, Steps

    seconds = {"none": 4.0, "pure forget": 2.0, "nothing masked, micro": 8.0, "25 %, micro": 4.0, "none, micro": 16.0}

    class TwoRounds:
        def rounds(self, ways, rounds, limit):
            found = {key: seconds.get(key[1], 4.0) for key in ways if isinstance(key, tuple)} | {MATMUL: 1, PLAIN: 2}
            return {key: [found[key], 2 * found[key]] for key in ways}

    monkeypatch.setattr("steps.peak_growth", lambda way: 1.0)
    steps = Steps(SETTINGS[name](), CPU, torch.float32, ["runs"])
    for way in steps.ways.values():
        way()
    roofline = Roofline(CPU, torch.float32)
    rows = {r["row"]: r for r in steps.measure(TwoRounds(), roofline, 2, 1)}
    wanted = {"none": 1, "nothing masked": 1, "pure forget": 0.5, "25 %, step": 0.875, "25 %, micro": 0.25,
              "nothing masked, micro": 0.5, "5 %, micro": 0.45}  # fmt: skip
    assert {row: rows[row]["ratio"]["p50"] for row in wanted} == pytest.approx(wanted)
    assert all(rows[row]["ratio"]["p20"] == rows[row]["ratio"]["p80"] for row in wanted)
    assert rows["none"]["ratio_public"]["p50"] == 2 and rows["pure forget"]["ratio_public"]["p50"] == 1
    tokens, shape = rows["none"]["tokens"], SETTINGS[name]().model
    assert tokens == SETTINGS[name]().sequences * shape.context
    assert rows["nothing masked, micro"]["tokens"] == 4 * SETTINGS[name]().micro_batch * shape.context
    expected = steps.flops * tokens / 4.0 / roofline.flops
    assert rows["none"]["flops_utilisation"]["p80"] == pytest.approx(expected, rel=1e-4)
    targets = {row: r.get("target") for row, r in rows.items()}
    assert targets[PLAIN] is targets["none"] is targets["none, token"] is None
    assert (targets["nothing masked"], targets["5 %, micro"], targets["25 %, token"]) == (1.0, 1.0, 0.96)


def test_steps_that_do_not_train_are_not_reported():
    from model_shapes import SETTINGS
    from roofline import Roofline
    from steps import Steps

    from sgtm_kernels.timing import Clock

    for broken in ("ours", "plain"):
        steps = Steps(SETTINGS["tiny-llama"](), CPU, torch.float32, ["runs"])
        with torch.no_grad():
            getattr(steps, broken).mixed.masters["blocks.1.mlp_norm.weight"].fill_(float("nan"))
        with pytest.raises(RuntimeError, match="loss nan"):
            steps.measure(Clock(CPU), Roofline(CPU, torch.float32), 1, 1)


def test_model_flops():
    """By hand: 6 N + 12 H Q times the keys of two layers, of which the second sees 16."""
    from model_shapes import TINY_LLAMA, preset

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
    from model_shapes import SETTINGS
    from steps import Steps

    steps = Steps(SETTINGS[name](), CPU, torch.float32, [])
    assert steps.flops == SETTINGS[name]().model.flops_per_token(parameters)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "124m", "254m", "llama-1b"])
def test_every_share_in_every_mixing_mode_once(name):
    from model_shapes import SETTINGS
    from step_cases import Case, cases, random_batches

    setting = SETTINGS[name]()
    found = cases(setting)
    masked = [case for key, case in found.items() if not key.startswith("none")]
    modes = [(case.percent, mode) for case in masked for mode in case.mixing]
    assert set(modes) == set(product((0, 5, 25, 100), ("step", "micro", "sequence", "token")))
    steps = [(case.strategy, case.batches) for case in found.values() if isinstance(case, Case)]
    assert len(set(steps)) == len(steps)

    def share(case) -> float:
        if not isinstance(case, Case):
            assert sum(case.weights.values()) == pytest.approx(1)
            return sum(weight * share(found[part]) for part, weight in case.weights.items())
        pieces = [(label, n) for batch in case.batches for label, n in zip(batch.labels, batch.lengths, strict=True)]
        assert sum(n for _, n in pieces) == len(case.batches) * setting.micro_batch * setting.model.context
        return sum(n for label, n in pieces if label == 2) / sum(n for _, n in pieces)

    tokens = {key: random_batches(setting, case.batches, CPU) for key, case in found.items() if isinstance(case, Case)}
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
    from model_shapes import SETTINGS
    from step_cases import cases

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

    from model_shapes import ModelShape, preset

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
    from step_cases import by_micro_batch, random_batches, tables_of

    setting, trained = ours(name, torch.bfloat16)
    tables = tables_of(setting, "sgtm")

    def gathered(batches) -> dict:
        trained.mixed.forget_gradients()
        for batch in batches:
            loss, _ = trained.mixed.model(batch.input_ids, batch.targets, batch.plan(tables), 1.0)
            loss.backward()
        return {key: master.grad for key, master in trained.mixed.masters.items()}

    batches = random_batches(setting, by_micro_batch(setting, 25), CPU)
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
    from step_cases import cases, random_batches, tables_of

    setting, trained = ours("tiny-llama")
    chosen = cases(setting)[case]
    tables, batches = tables_of(setting, chosen.strategy), random_batches(setting, chosen.batches, CPU)
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
