"""The benchmark of whole training steps, on a CPU at tiny shapes: same work on both sides, and no more than the masks
leave.
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
    from sgtm.measure.cases import cases, random_batches

    case = cases(setting)[name]
    batches = random_batches(case.batches, setting.model, CPU)
    ours.step("torch", case.tables, batches)
    return live_keys(case.tables, batches[0].step_labels)


def test_every_step_is_timed_on_a_bare_machine(tmp_path):
    from sgtm.measure.cases import cases
    from sgtm.measure.models import SETTINGS

    absent, to = set(ABSENT) - {"sgtm"}, tmp_path / "steps.jsonl"
    to.write_text('{"row": "of before"}\n')
    options = ["--device", "cpu", "--rounds", "3", "--backend", "torch", "--json", str(to)]
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
        with monkeypatch.context() as patches:
            patches.setattr(torch.cuda, "is_available", lambda options=options: "cuda" in options)
            patches.setattr(torch.cuda, "empty_cache", lambda: None)
            patches.setattr(sys, "argv", ["steps.py", *options.split()])
            assert steps.main() == 1  # nothing was measured
        assert taken == expected
        assert ("--shape tiny, because this is a CPU" in capsys.readouterr().out) == (not options)


def test_model_flops():
    """By hand: 6 N + 12 H Q times the keys of two layers, of which the second sees 16."""
    from sgtm.measure.models import TINY_LLAMA, preset

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
    from sgtm.measure.mixings import MixingSweep
    from sgtm.measure.models import SETTINGS

    steps = MixingSweep(name, SETTINGS[name](), CPU, torch.float32, ["torch"])
    assert steps.flops == SETTINGS[name]().model.flops_per_token(parameters)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama", "124m", "254m", "llama-1b"])
def test_every_share_in_every_mixing_mode_once(name):
    from sgtm.measure.cases import Case, cases, random_batches
    from sgtm.measure.models import SETTINGS

    setting = SETTINGS[name]()
    variants = cases(setting)
    masked = [case for key, case in variants.items() if not key.startswith("none")]
    modes = [(case.percent, mode) for case in masked for mode in case.mixing]
    assert set(modes) == set(product((0, 5, 25, 100), ("step", "micro", "sequence", "token")))
    steps = [(id(case.tables), case.batches) for case in variants.values() if isinstance(case, Case)]
    assert len(set(steps)) == len(steps)

    def share(case) -> float:
        if not isinstance(case, Case):
            assert sum(case.weights.values()) == pytest.approx(1)
            return sum(weight * share(variants[part]) for part, weight in case.weights.items())
        pieces = [(label, n) for batch in case.batches for label, n in zip(batch.labels, batch.lengths, strict=True)]
        assert sum(n for _, n in pieces) == len(case.batches) * setting.micro_batch * setting.model.context
        return sum(n for label, n in pieces if label == 2) / sum(n for _, n in pieces)

    tokens = {
        key: random_batches(case.batches, setting.model, CPU)
        for key, case in variants.items()
        if isinstance(case, Case)
    }
    for key, batches in tokens.items():
        for got, want in zip(batches, tokens[variants[key].of], strict=True):
            assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.targets, want.targets)

    for case in variants.values():
        assert share(case) == pytest.approx(case.percent / 100, abs=0.005 if "token" in case.mixing else 1e-9)
        base = variants[case.of]
        parts = [case] if isinstance(case, Case) else [variants[part] for part in case.weights]
        for part in parts:  # the same micro-batches and documents, whatever the labels
            assert [(sum(b.lengths), b.documents) for b in part.batches] == [
                (sum(b.lengths), b.documents) for b in base.batches
            ]


@tiny_shapes
def test_labels_change_where_the_mixing_mode_says(name):
    from sgtm.measure.cases import cases
    from sgtm.measure.models import SETTINGS

    setting = SETTINGS[name]()
    variants = cases(setting)
    assert [set(b.labels) for b in variants["25 %, micro"].batches] == [{2}, {0}, {0}, {0}]
    assert {2, 0} in [set(b.labels) for b in variants["25 %, sequence"].batches]
    for batch in variants["5 %, token"].batches:
        ends = {end for _, end in batch.documents}
        context = setting.model.context
        assert ends >= set(range(context, setting.micro_batch * context + 1, context))
        assert [end - start for start, end in batch.documents] == list(batch.lengths)
        first = batch.labels[: len(batch.labels) // setting.micro_batch]
        assert set(first) == {0, 2} and len({batch.labels[i::5] for i in range(5)}) > 1


def test_shapes_are_those_of_the_presets():
    from dataclasses import asdict

    from sgtm.masking.shape import ModelShape
    from sgtm.measure.models import preset

    fields = {name: field.get_default() for name, field in ModelConfig.model_fields.items() if not field.is_required()}
    assert {f.name: f.default for f in ModelShape.__dataclass_fields__.values() if f.name in fields} == fields
    for name in preset_names():
        config = load_config(name, [])
        got, want = preset(name, 3, 2), config.model
        assert asdict(got.model) == want.model_dump() | {"activation_checkpointing": False}
        assert got.partition.layers == config.partition.layers
        assert got.joint == (config.masking.joint or "free") or config.recipe  # a recipe's masks are not timed there
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
    from sgtm.measure.cases import cases, random_batches

    setting, trained = ours(name, torch.bfloat16)
    case = cases(setting)["25 %, micro"]

    def gathered(batches) -> dict:
        trained.mixed.zero_grad()
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
    from sgtm.measure.cases import cases, random_batches

    setting, trained = ours("tiny-llama")
    chosen = cases(setting)[case]
    tables, batches = chosen.tables, random_batches(chosen.batches, setting.model, CPU)
    _, other = ours("tiny-llama")
    other.step("triton", tables, batches)
    assert other.optimizer.backend == other.mixed.model.blocks[1].mlp.backend == "triton"
    trained.step("torch", tables, batches)
    torch.testing.assert_close(other.loss, trained.loss, rtol=1e-5, atol=0)
    for key, master in trained.mixed.masters.items():
        mean = other.optimizer.state[other.mixed.masters[key]]["exp_avg"]
        wanted = trained.optimizer.state[master]["exp_avg"]
        torch.testing.assert_close(mean, wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())
        assert (other.mixed.masters[key] - master).abs().max() <= 2e-4
