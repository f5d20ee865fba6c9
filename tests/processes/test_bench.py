"""`sgtm bench`, run for real on the debug preset: every row is a step under the mask that its name says."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import threading
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from waiting import PATIENCE

from sgtm.commands.main import main
from sgtm.config import load_config
from sgtm.measure.bench import engine_steps, label_cases
from sgtm.measure.bench import rows as rows_of
from sgtm.measure.cases import NONE
from sgtm.measure.peer import Peer
from sgtm.measure.rounds import LEAST, LocalStep, Rounds, Took, take_rounds

ROOT = Path(__file__).parents[2]
ROWS = ["none", "nothing masked", "25 % forget sequences", "pure forget", "pure forget, joint masked", "pure retain"]
TEN = ["--masking.domains=[a, b]", "--masking.strategy=gram", "--train.tokens_per_step=640", "--train.micro_batch=10"]


def take(file: str) -> dict:
    """What the command prints and writes, and the rows of two configs; in a process of its own."""
    os.environ["COLUMNS"] = "80"
    one = ["bench", "debug", "--rounds", "1", "--masking.domains=[a, b]", "--train.steps=10"]
    commands = ["bench", "debug", "--rounds", "3", "--json", file, "--train.micro_batch", "4"], one
    outputs = {"commands": [called(*command) for command in commands], "one": rows(), "two": rows(*TEN)}
    return outputs | {"compiled": compiled("blocks"), "as it is": compiled("off")}


def compiled(value: str) -> bool:
    """Whether the engine of the steps has compiled blocks; the compiler itself is left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sgtm.training.start.check_compiler", lambda *_: None)
        patch.setattr("torch.compile", lambda forward, **_: forward)
        config = load_config("debug", ["--train.compile", value])
        engine = next(iter(engine_steps(config, label_cases(config, 1)).values())).call.args[0]
    return engine.module.compiled


def called(*arguments: str) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(list(arguments))
    return status, out.getvalue(), err.getvalue()


def rows(*overrides: str) -> dict[str, SimpleNamespace]:
    config = load_config("debug", list(overrides))
    cases = {}
    for name, step in engine_steps(config, label_cases(config, 1)).items():
        _, batches, tables, *_ = step.call.args
        cases[name] = SimpleNamespace(tables=tables, batches=batches, labels=[b.labels for b in batches])
    return cases


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bench") / "new" / "rows.jsonl"


@pytest.fixture(scope="module")
def taken(file) -> dict:
    return run_ranks(take, 1, str(file))[0]


def test_the_command_prints_and_writes_every_row(taken, file):
    status, printed, _ = taken["commands"][0]
    setting = "debug, batch 8 x 64 in micro-batches of 4, fp32: "
    assert status == 0 and f"{setting}3 rounds; time and memory" in printed
    assert printed.startswith(f"{setting}measuring 6 rows in 3 rounds; so few compare nothing: --rounds 15\n")
    assert printed.endswith("ratios compare steps of the same round; tokens/s are those of none over the ratio\n")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["row"] for row in rows] == ROWS
    for row in rows:
        (line,) = (line for line in printed.splitlines() if line.strip().startswith(row["row"] + "  "))
        assert len(line) <= 80 and f"{row['tokens_per_second']:,.0f}" in line
        assert row is rows[0] or (f"/{row['ratio']['p50']:.3f}/" in line and f" {row['cpu_ratio']['p50']:.3f} " in line)
        assert row["rounds"] == 3 and row["wall"]["p20"] > 0 and row["versions"]["torch"] == torch.__version__
        assert row["of"] == (NONE if row is not rows[0] else None) and row["target"] is row["missed"] is None


def test_the_report_reads_the_rows(taken, file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("report_of_benchmarks", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    table = report.steps(report.read_rows(file))
    assert all(f"\n| {name} |" in table for name in ROWS) and "3 interleaved rounds; debug, batch 8 x 64" in table
    assert "| CPU time |" in table


def test_blocks_are_compiled_as_the_config_has_it(taken):
    assert (taken["compiled"], taken["as it is"]) == (True, False)


def test_each_row_has_the_labels_and_tables_of_its_name(taken):
    rows = taken["one"]
    assert {name: Counter(sum(row.labels, ())) for name, row in rows.items()} == {
        "none": {0: 8},
        "nothing masked": {0: 8},
        "25 % forget sequences": {2: 2, 0: 6},
        "pure forget": {2: 8},
        "pure forget, joint masked": {2: 8},
        "pure retain": {1: 8},
    }
    assert rows["25 % forget sequences"].labels == [(2, 0), (2, 0), (0, 0), (0, 0)]
    update = {name: row.tables.update["mlp_in"][2][0] for name, row in rows.items()}
    assert update == {name: float(name == "none") for name in ROWS}
    embedding = {name: row.tables.update_joint["embedding"][2] for name, row in rows.items()}
    assert embedding == {name: float(name != "pure forget, joint masked") for name in ROWS}
    for row in rows.values():
        assert all(batch.step_labels == frozenset(sum(row.labels, ())) for batch in row.batches)
        assert sum((batch.targets >= 0).sum() for batch in row.batches) == row.batches[0].step_targets


def test_several_domains_take_turns_and_pure_is_of_the_first(taken):
    rows = taken["two"]
    assert list(rows) == ["none", "nothing masked", "20 % forget sequences", "pure forget (a)", "pure retain"]
    assert rows["20 % forget sequences"].labels == [(3, 2, *[0] * 8)]
    assert rows["pure forget (a)"].labels == [(2,) * 10]


def test_one_round_is_said_and_which_domain(taken):
    status, printed, _ = taken["commands"][1]
    assert status == 0 and "fp32: measuring 6 rows in 1 round; so few" in printed and "fp32: 1 round; time" in printed
    assert "pure forget (a)" in printed


def test_a_step_without_a_quarter_is_refused_before_there_is_a_model(capsys, monkeypatch):
    monkeypatch.setattr("sgtm.measure.bench.init_distributed", lambda *args: SimpleNamespace(rank=0, world_size=2))
    monkeypatch.setattr("sgtm.measure.bench.engine_steps", lambda *args: pytest.fail("a model was built"))
    assert main(["bench", "debug", "--train.tokens_per_step=256", "--train.micro_batch=2"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and printed.err.startswith("error: train.tokens_per_step 256 is 2 sequences of 64 for each")
    assert "--train.tokens_per_step 512" in printed.err


@pytest.mark.parametrize("file_exists", [True, False])
def test_what_is_broken_off_leaves_no_empty_file(file_exists, tmp_path, monkeypatch):
    def broken_off(*args):
        raise KeyboardInterrupt

    file = tmp_path / "rows.jsonl"
    if file_exists:
        file.write_text("rows of before")
    monkeypatch.setattr("sgtm.measure.bench.init_distributed", broken_off)
    assert main(["bench", "debug", "--json", str(file)]) == 130
    assert file.read_text() == "rows of before" if file_exists else not file.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--masking.domains", "[]"], "error: masking.domains is empty, so nothing is masked; name one: --masking"),
        (["--masking.strategy", "none"], "error: masking.strategy none masks nothing; name another: --m"),
        (["--json", "/proc/none/rows.jsonl"], "error: /proc/none: No such file or directory"),
        (["--json", "/proc"], "error: --json: /proc is a folder, but it takes a file"),
        (["--tune"], "error: --tune needs a CUDA device and there is none here; without a table the heuristics hold\n"),
        (["--tune", "--kernels.backend", "triton"], "error: --tune needs a CUDA device and there is none here; w"),
    ],
)
def test_a_mistake_is_a_message_before_anything_is_measured(overrides, message, capsys, monkeypatch):
    monkeypatch.setattr("sgtm.measure.bench.init_distributed", lambda *args: pytest.fail("began"))
    assert main(["bench", "debug", *overrides]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and not printed.out


class Timed:
    """A step whose second round takes twice as long."""

    def __init__(self, seconds: float, calls: list, name: str = ""):
        self.seconds, self.calls, self.name, self.taken = seconds, calls, name, 0

    def step(self) -> Took:
        self.calls.append(self.name)
        self.taken += 1
        return Took(self.seconds * self.taken, 2 * self.seconds * self.taken**2)

    def peak(self) -> float:
        return 100 * self.seconds


def test_steps_take_turns_in_rounds_of_another_order_each():
    calls = []
    steps = {name: Timed(1.0, calls, name) for name in "abcd"}
    measurement = take_rounds(steps, 20)
    assert all(len(took) == 20 for took in measurement.took.values())
    rounds = ["".join(calls[i : i + 4]) for i in range(4, len(calls), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds) and len(set(rounds)) > 5
    assert len(take_rounds(steps, 20, seconds=0).took["a"]) == LEAST


def test_a_row_is_compared_with_the_unmasked_step_of_the_same_round():
    """The second round at half the speed: ratios do not see it. tokens/s follow from them."""
    steps = {"none": Timed(2.0, []), "pure forget": Timed(1.0, [])}
    rows = rows_of(load_config("debug"), take_rounds(steps, 2))
    assert [set(rows[1][key].values()) for key in ("ratio", "cpu_ratio")] == [{0.5}, {0.5}]
    assert rows[1]["memory_ratio"] == 0.5 and "ratio" not in rows[0]
    assert [row["tokens_per_second"] for row in rows] == [round(512 / 5, 1), round(1024 / 5, 1)]


def test_targets_hold_for_the_18m_shape_and_the_best_peer():
    config, cpu = load_config("tinystories-18m", []), {"nothing masked": 1.02, "25 % forget sequences": 1.0}
    cpu |= {"pure forget": 0.95, "pure forget, joint masked": 0.79, "none": 1.0}
    rounds = Rounds({name: [Took(1.0, seconds)] for name, seconds in cpu.items()})
    rounds.took |= {"Hugging Face, a": [Took(1.9, 9.0)], "Hugging Face, b": [Took(1.7, 9.0)], "Hugging Face, c": []}
    rounds.failed = {"Hugging Face, c": "RuntimeError: no"}
    verdicts = {row["row"]: (row.get("target"), row.get("missed")) for row in rows_of(config, rounds)}
    assert verdicts == {
        "none": (None, None),
        "nothing masked": ("CPU <= 1.01", True),
        "25 % forget sequences": ("CPU <= 1.00", False),
        "pure forget": ("CPU <= 0.93", True),
        "pure forget, joint masked": ("CPU <= 0.80", False),
        "Hugging Face, a": (None, None),
        "Hugging Face, b": ("time >= 1.80", True),
        "Hugging Face, c": (None, None),
    }
    assert all(row["target"] is None for row in rows_of(load_config("debug"), rounds) if "error" not in row)


def test_a_step_of_ours_that_fails_ends_the_measurement():
    class Broken(Timed):
        def step(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        take_rounds({"none": Broken(1.0, [])}, 1, may_fail=["peer"])
    assert take_rounds({"peer": Broken(1.0, [])}, 1, may_fail=["peer"]).failed == {"peer": "RuntimeError: broken"}


def test_a_step_takes_the_cpu_time_of_its_process():
    """Half a second of waiting is wall time alone; work of another thread is CPU time as well."""
    waiting = LocalStep(lambda: time.sleep(0.3)).step()
    assert waiting.wall >= 0.3 and waiting.cpu < 0.15

    def work() -> None:
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    def both() -> None:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert LocalStep(both).step().cpu >= 0.4


@pytest.mark.parametrize("overrides", [[], ["--model.family", "llama"]])
def test_hugging_face_trains_with_the_best_attention_it_has(overrides):
    """In a process of its own, whose CPU time counts; a family without SDPA takes eager attention."""
    peer = Peer(load_config("debug", ["--model.window", "null", *overrides]), "bf16 weights")
    assert all(0 < seconds < PATIENCE for seconds in peer.step())
    assert peer.attention() == ("sdpa" if overrides else "eager")
    assert peer.peak() >= 0
    peer.process.terminate()
    peer.process.join()
    with pytest.raises(RuntimeError, match="the process of Hugging Face's model exited with -15"):
        peer.step()


def test_what_a_peer_cannot_do_is_said():
    with pytest.raises(RuntimeError, match="GPT-Neo's LM head has no bias"):
        Peer(load_config("debug", ["--model.head_bias", "true"]), "bf16 weights").step()


@pytest.mark.parametrize("preset", ["tinystories-18m", "llama-1b"])
def test_kernels_are_tuned_at_the_shape_of_the_config(preset, monkeypatch):
    from sgtm_kernels.tools import tune

    tuned = []
    monkeypatch.setattr(tune, "tune", lambda shapes: tuned.extend(shapes))
    monkeypatch.setattr(
        "sgtm.measure.bench.init_distributed", lambda *args: (_ for _ in ()).throw(ValueError("enough"))
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    overrides = ["--masking.domains", "[es]", "--masking.forget_heads", "4", "--masking.forget_neurons", "24"]
    overrides += ["--kernels.backend", "triton"]
    assert main(["bench", preset, "--tune", *overrides]) == 2
    m = load_config(preset, []).model
    (shape,) = tuned
    assert (shape.width, shape.neurons, shape.gated) == (m.hidden_size, m.intermediate_size, preset == "llama-1b")
    assert (shape.forget_heads, shape.forget_neurons, shape.layout.head_dim) == (4, 24, m.size_per_head)


@pytest.mark.parametrize(
    ("overrides", "variables", "message"),
    [
        ([], {}, "but kernels.backend is 'torch' here: --kernels.backend triton"),
        (["--kernels.backend", "reference"], {}, "but kernels.backend is 'reference' here: --kernels.backend triton"),
        ([], {"SGTM_KERNELS": "triton", "SGTM_TUNED": "off"}, "but SGTM_TUNED='off' is what would be read; unset it"),
    ],
)
def test_what_is_tuned_is_what_is_measured(overrides, variables, message, monkeypatch, capsys):
    from sgtm_kernels.tools import tune

    monkeypatch.delenv("SGTM_KERNELS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda shapes: pytest.fail("tuned"))
    assert main(["bench", "debug", "--tune", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_several_processes_do_not_tune(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "debug", "--tune"]) == 2
    assert "--tune is for one process" in capsys.readouterr().err
