"""The run of benchmarks/gpu.py: limits, failures, kills and continuing, without a GPU and mostly without torch."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bare import ABSENT, ROOT, environment_without, python_path
from waiting import wait_until

pytestmark = pytest.mark.usefixtures("benchmarks")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def unit(name: str, code: str, rows: str = "rows.jsonl", **options):
    from gpu_stages.driver import Unit

    return Unit(name, lambda limit: [sys.executable, "-c", textwrap.dedent(code)], rows, **options)


def stage(name: str, *units, **options):
    from gpu_stages.driver import Stage

    return Stage(name, name, options.pop("share", 1.0), units, **options)


def run(folder: Path, stages, budget: float = 60, **options) -> list[dict]:
    """The rows of stages.jsonl."""
    from gpu_stages.driver import STAGES, Driver
    from journal import Journal

    Driver(folder, budget, write=lambda text: None, **options).run(stages)
    return Journal(folder / STAGES).rows()


ITEMS = """
    import os, signal, time
    from pathlib import Path
    from journal import Items, Journal

    items = Items(Journal(Path({folder!r}) / {rows!r}))
    for name in {names!r}:
        def rows():
            {body}
            return [{{"value": name}}]
        items.measure(name, rows)
"""


def worker(folder: Path, names: str, body: str = "pass", name: str = "all", rows: str = "rows.jsonl", **options):
    return unit(name, ITEMS.format(folder=str(folder), names=names, body=body, rows=rows), rows, **options)


def rows_of(folder: Path, name: str = "rows.jsonl") -> list[dict]:
    from journal import Journal

    return Journal(folder / name).rows()


@pytest.mark.parametrize("seed", range(20))
def test_limits_are_within_the_budget_and_unused_time_passes_on(seed, tmp_path):
    """The stages of a GPU by a clock that only their costs advance: whatever they cost, each gets its share."""
    from gpu_stages.driver import Ended
    from gpu_stages.stages import ON_GPU_SHARES, stages

    now, dice, limits, unused = [0.0], random.Random(seed), {}, []

    def execute(stage, unit, limit):
        # Units that run at the same time end at the same time.
        limits.setdefault(stage.name, []).append(limit)
        unused.append(budget - now[0] - limit)
        if stage.parallel > 1:
            return Ended()
        cost = dice.choice([0.1, 5.0, 60.0, 1000.0])
        now[0] += min(cost, limit)
        return Ended(cut=cost >= limit)

    budget = dice.choice([120.0, 540.0])
    all_stages = stages(tmp_path)
    rows = run(tmp_path, all_stages, budget, execute=execute, clock=lambda: now[0])
    assert now[0] <= budget + 1e-6 and unused[-1] == pytest.approx(0, abs=1e-6), "the last unit gets all that is left"
    assert {row["stage"] for row in rows} == {stage.name for stage in all_stages}
    for stage, share in zip(all_stages, ON_GPU_SHARES, strict=True):
        allowed = sum(limits[stage.name]) if stage.parallel == 1 else limits[stage.name][0]
        assert max(limits[stage.name]) <= budget and allowed >= share / sum(ON_GPU_SHARES) * budget - 1e-6


def test_shares_are_those_of_the_readme():
    """Of 540 seconds, the default budget, a share is a second."""
    from gpu_stages.stages import NAMES, ON_GPU_SHARES

    rows = re.findall(r"^\| (\w+) \| .* \| (\d+) \|$", (ROOT / "docs" / "performance.md").read_text(), re.M)
    assert [(name, int(share)) for name, share in rows if name in NAMES] == list(zip(NAMES, ON_GPU_SHARES, strict=True))
    assert sum(ON_GPU_SHARES) == 540


def test_a_hanging_stage_is_killed_with_all_its_processes_and_recorded(tmp_path):
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print("about to hang", flush=True)
        time.sleep(3000)
    """
    hanging, after = run(tmp_path, [stage("hangs", unit("all", code)), stage("after", unit("all", "pass"))], 4)
    assert (hanging["outcome"], hanging["signal"], after["outcome"]) == ("cut", None, "done")
    assert hanging["seconds"] >= hanging["limit"] - 0.01 and "about to hang" in hanging["tail"]
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    return state(pid) not in (None, "Z")


def state(pid: int) -> str | None:
    """As proc(5) has it: T where it is stopped, Z where it has ended and its parent has not waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return None


def test_a_crash_is_a_row_and_ends_nothing_else(tmp_path):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    wrong = "raise ValueError('no such thing')"
    stages = [stage("first", unit("crash", crash), unit("wrong", wrong)), stage("after", unit("all", "pass"))]
    crashed, failed, done = run(tmp_path, stages)
    assert (crashed["outcome"], crashed["signal"]) == ("crashed", "SIGSEGV")
    assert (failed["outcome"], failed["exit"]) == ("failed", 1) and "no such thing" in failed["tail"]
    assert done["outcome"] == "done"
    assert len(run(tmp_path, stages)) == 3  # finished, failed or not
    assert [row["unit"] for row in run(tmp_path, stages, again=True)[3:]] == ["crash", "wrong"]


def test_items_after_one_that_crashes_hangs_or_breaks_the_device_are_measured(tmp_path):
    body = """
            if name == "b": os.kill(os.getpid(), signal.SIGSEGV)
            if name == "d": time.sleep(3000)
            if name == "e": raise ValueError("wrong")
            """.strip()
    (row,) = run(tmp_path, [stage("s", worker(tmp_path, "abcdefg", body), item=0.15)], 12)
    assert row["outcome"] == "done"
    rows = rows_of(tmp_path)
    outcomes = {r["item"]: r["outcome"] for r in rows}
    assert len(rows) == 7 and outcomes == dict.fromkeys("acfg", "ok") | {"b": "crashed", "d": "hung", "e": "failed"}
    assert {r["item"]: r["error"] for r in rows if "error" in r} == {
        "b": "SIGSEGV", "d": "killed after 15% of the stage's time", "e": "ValueError: wrong"
    }  # fmt: skip
    run(tmp_path, [stage("s", worker(tmp_path, "abcdefg"))])
    assert len(rows_of(tmp_path)) == 7
    run(tmp_path, [stage("s", worker(tmp_path, "abcdefg"))], again=True)
    assert [(r["item"], r["outcome"]) for r in rows_of(tmp_path)[10:]] == [(i, "ok") for i in "bde"]


def test_a_device_that_does_not_answer_gets_a_new_process(tmp_path):
    from journal import OK, Items, Journal

    items = Items(Journal(tmp_path / "rows.jsonl"), healthy=lambda: False)
    items.measure("fine", lambda: [{}])
    with pytest.raises(SystemExit) as ended:
        items.measure("illegal access", lambda: 1 / 0)
    assert ended.value.code == Items.RESTART
    from gpu_stages.driver import Ended

    codes = iter([Items.RESTART, 0])
    (row,) = run(tmp_path, [stage("s", unit("u", ""))], execute=lambda *arguments: Ended(next(codes)))
    assert row["outcome"] == "done" and [r["outcome"] for r in items.journal.rows()] == [OK, "failed"]


def test_a_torn_last_line_is_dropped(tmp_path):
    from journal import Journal

    journal = Journal(tmp_path / "rows.jsonl", {"commit": "abc"})
    journal.add({"n": 1}, {"n": 2})
    with open(journal.path, "a") as file:
        file.write('{"n": 3, "com')
    assert [row["n"] for row in journal.rows()] == [1, 2]
    journal.add({"n": 4})
    assert [row["n"] for row in journal.rows()] == [1, 2, 4] and {row["commit"] for row in journal.rows()} == {"abc"}
    assert journal.path.read_text().count("\n") == 3


RUN = """
    import sys
    from pathlib import Path
    import gpu, gpu_stages.stages
    from gpu_stages.driver import Driver, Processes, Stage, Unit

    folder = Path(sys.argv[1])
    def unit(name, script):
        return Unit(name, lambda limit: [sys.executable, script], f"{{name}}.jsonl")
    with gpu.locked(folder) as lock:
        stages = [Stage(n, n, 1.0, [unit(n, f"{{folder}}/{{n}}.py")]) for n in "xyz"]
        Driver(folder, 60, execute=Processes(folder, lock)).run(stages)
"""


def test_killed_at_any_moment_no_row_is_lost_and_the_next_run_continues(tmp_path):
    """Twelve kills of three fast stages. The stages' processes end with the run, before the next one begins."""
    names = [f"item {i}" for i in range(30)]
    for n in "xyz":
        code = ITEMS.format(folder=str(tmp_path), rows=f"{n}.jsonl", names=names, body="time.sleep(0.03)")
        (tmp_path / f"{n}.py").write_text(textwrap.dedent(code))
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN.format()))
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'kernels'}:{os.environ['PYTHONPATH']}"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    dice, seen, kills = random.Random(0), [], 0
    while True:
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=dice.uniform(0.15, 0.9) if kills < 12 else 60) == 0
            break
        except subprocess.TimeoutExpired:
            finished = [row for n in "xyz" for row in rows_of(tmp_path, f"{n}.jsonl")]
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        after = [row for n in "xyz" for row in rows_of(tmp_path, f"{n}.jsonl")]
        assert len(finished) >= len(seen) and all(row in after for row in finished)
        seen = finished
    assert kills >= 5
    for n in "xyz":
        assert [row["item"] for row in rows_of(tmp_path, f"{n}.jsonl")] == names  # each once: none was measured beside
    assert [row["outcome"] for row in rows_of(tmp_path, "stages.jsonl")] == ["done"] * 3


def test_the_processes_of_a_killed_run_are_gone_before_the_next_one_begins(tmp_path, monkeypatch):
    """Stopped, so that they live on for a while: the folder is theirs until then."""
    import gpu

    monkeypatch.setattr(gpu, "LOCK", 0.2)
    (tmp_path / "x.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(3000)"
    )
    (tmp_path / "run.py").write_text(textwrap.dedent(RUN.format()))
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'kernels'}:{os.environ['PYTHONPATH']}"}
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path)], env=environ)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    os.killpg(os.getpgid(pid), signal.SIGSTOP)
    wait_until(lambda: state(pid) == state(os.getpgid(pid)) == "T")
    process.kill()
    process.wait()
    with pytest.raises(SystemExit, match="another run is writing to"), gpu.locked(tmp_path):
        pass
    os.killpg(os.getpgid(pid), signal.SIGCONT)
    wait_until(lambda: not alive(pid))
    with gpu.locked(tmp_path):
        pass


def gpu_run(folder: Path, tmp_path: Path, *options: str, **more) -> subprocess.Popen:
    """gpu.py --cpu on a machine without most packages."""
    absent = set(ABSENT) - {"sgtm"}  # that of the checkout
    environ = environment_without(absent, tmp_path) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "--cpu", "--out", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, **more)


def test_a_run_on_a_cpu_killed_once_and_continued(tmp_path):
    """Real stages, of one op."""
    out = tmp_path / "out"
    options = [
        "--only",
        "rates,warm,smoke,profile,steps,ops,tune,tests,train,norm",
        "--budget",
        "300",
        "--commit",
        "first",
    ]
    process = gpu_run(out, tmp_path, *options)
    wait_until(lambda: len(rows_of(out, "rates.jsonl")) > 0)
    process.kill()
    process.communicate()
    before = rows_of(out, "rates.jsonl")
    output, _ = gpu_run(out, tmp_path, *options).communicate()
    assert before == rows_of(out, "rates.jsonl")[: len(before)]
    assert [row["rate"] for row in rows_of(out, "rates.jsonl")] == ["copy", "matmul"]
    outcomes = {(row["stage"], row["unit"]): row["outcome"] for row in rows_of(out, "stages.jsonl")}
    del outcomes["tests", "rest"]  # red where those tests are
    assert set(outcomes.values()) == {"done"} and len(outcomes) == 9, output
    smoke = rows_of(out, "smoke.jsonl")
    assert len(smoke) == 8 and {row["outcome"] for row in smoke} == {"ok"}, smoke
    assert {row["item"] for row in rows_of(out, "tests.jsonl")} == {"test_arguments.py", "test_dispatch.py"}
    assert "deepspeed" in rows_of(out, "train.jsonl")[0]["missing"]
    assert len(rows_of(out, "ops.jsonl")) == 5 and rows_of(out, "warm.jsonl")[0]["launches"] == 1
    (profile,), steps = rows_of(out, "profile.jsonl"), rows_of(out, "steps-tiny.jsonl")
    assert profile["steps"] == 3 and profile["launches"] > 100 and 0 < profile["busy_share"] <= 1
    assert not any("error" in row for row in steps), steps
    assert {"none", "plain PyTorch", "pure forget", "25 %, token", "25 %, micro"} <= {row.get("row") for row in steps}
    for name in ("rates", "warm", "smoke", "profile", "ops", "tests", "train"):
        for row in rows_of(out, f"{name}.jsonl"):
            assert row["commit"] == "first" and row["device"] and {"torch", "triton"} <= set(row["versions"])
            assert "driver" in row and row["time"]
    assert "norm           passed" in output and "attention      not run" in output
    other = gpu_run(out, tmp_path, "--commit", "second", stderr=subprocess.PIPE)
    _, problem = other.communicate()
    assert other.returncode == 2 and "holds rows of commit first, this is second; choose another --out" in problem


def test_without_a_gpu_it_says_so(tmp_path):
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path(tmp_path)}
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and "no CUDA device" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mlp,foo"], "argument --only: 'foo' is none of rates, "),
        (["--budget", "0"], "--budget: expected seconds above 0, got '0'"),
        (["--budget", "soon"], "--budget: expected seconds above 0, got 'soon'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(arguments, message, tmp_path, capsys):
    import gpu

    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())


PLAIN = "def test_one(): pass\ndef test_two(): assert 0, 'two is wrong'\n"
CRASH = "import os\ndef test_before(): pass\ndef test_after(): pass\ndef test_crash(): os._exit(3)\n"


def test_tests_are_rows_by_file_and_a_crash_is_one_failed_test(tmp_path):
    (tmp_path / "test_mlp.py").write_text(PLAIN)
    (tmp_path / "test_linear_memory.py").write_text(CRASH)
    (tmp_path / "test_plan.py").write_text("import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\n")
    from gpu_stages.stages import test_command

    files = [tmp_path / f"test_{name}.py" for name in ("mlp", "linear_memory", "plan")]
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT / 'kernels'}:{os.environ['PYTHONPATH']}"}
    subprocess.run(test_command(files, tmp_path / "rows.jsonl", 1), env=environ, cwd=tmp_path, capture_output=True)
    rows = rows_of(tmp_path)
    by_file = {row["item"]: row for row in rows if "item" in row}
    counts = {name: [row[key] for key in ("passed", "failed", "skipped")] for name, row in by_file.items()}
    assert counts == {"test_mlp.py": [1, 1, 0], "test_linear_memory.py": [2, 1, 0], "test_plan.py": [0, 0, 1]}
    assert {name: row["op"] for name, row in by_file.items()} == {
        "test_mlp.py": "mlp", "test_linear_memory.py": "linear", "test_plan.py": None
    }  # fmt: skip
    assert by_file["test_linear_memory.py"]["failed_tests"] == ["test_crash"]
    assert [row["test"] for row in rows if "test" in row] == ["test_two", "test_crash"]
    assert "two is wrong" in json.dumps(rows)


def test_the_preset_of_the_train_stage_fits_the_embedded_corpus(monkeypatch):
    """What no CPU trains in a test: its options are a valid config, with the corpus's domain."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu_stages"))
    import train_runs

    from sgtm.config import load_config
    from sgtm.data.synthetic import RULES

    for options in (train_runs.GPU, train_runs.CPU):
        config = load_config(options[0], [*options[1:], *train_runs.COMMON])
        forgotten = {label.removeprefix("forget:") for label in RULES.labels.values() if label.startswith("forget:")}
        assert set(config.masking.domains) == forgotten and config.data.path == "synthetic"
        assert train_runs.KILLED_AFTER[options[0]] < config.train.steps
        assert train_runs.KILLED_AFTER[options[0]] > config.train.checkpoint_every
