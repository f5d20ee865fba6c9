"""Stage `train`: `sgtm train` itself, killed and resumed, compared with an uninterrupted run.

    train_runs.py ROWS --folder FOLDER [--cpu]

For ZeRO 1 and 3: 50 steps of a preset on the embedded corpus, with a row for their speed; then the same again, killed
with SIGKILL and resumed, with a row for whether weights, moments, step counts and logged losses of the two runs are
bit-identical. If packages of `sgtm` are missing, a row lists them and nothing runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from journal import FAILED, Items, Journal

from gpu_stages.stages import PACKAGES

ROOT = Path(__file__).parents[2]
GPU = ["gpt2-124m", "--train.steps=50", "--train.tokens_per_step=65536", "--train.checkpoint_every=15"]
GPU += ["--optimizer.warmup_steps=10", "--masking.domains=[es]", "--model.vocab_size=4096"]  # of the corpus
CPU = ["debug", "--train.steps=12", "--train.tokens_per_step=256", "--train.checkpoint_every=4"]
COMMON = ["--data.path=synthetic", "--train.log_every=1", "--train.eval_every=0"]
KILLED_AFTER = {"gpt2-124m": 35, "debug": 9}
PATIENCE = 300  # seconds for a run to reach that step


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    items = Items(Journal(args.rows))
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        print(f"left out: not installed: {', '.join(missing)}")
        items.measure("packages", lambda: [{"missing": missing}])
        return 0
    options = CPU if args.cpu else GPU
    for zero in (1, 3):
        for name, trial in ((f"zero {zero}, left alone", left_alone), (f"zero {zero}, killed", killed_and_resumed)):
            items.measure(name, lambda trial=trial, zero=zero: [trial(zero, args.folder, options)])
    return 0


def start(zero: int, folder: Path, options: list[str]) -> list[str]:
    return [*options, *COMMON, f"--distributed.zero_stage={zero}", f"--runs={folder}", "--overwrite"]


def left_alone(zero: int, folder: Path, options: list[str]) -> dict:
    name = f"whole-zero-{zero}"
    finish(begin([*start(zero, folder, options), f"--name={name}"]))
    row = {"preset": options[0], "zero_stage": zero, "options": options[1:]}
    return row | {"tokens_per_second": speed(folder / name)}


def killed_and_resumed(zero: int, folder: Path, options: list[str]) -> dict:
    sys.path.insert(0, str(ROOT / "tests"))
    from same_run import assert_same_run, metrics

    from sgtm.run.checkpoint import find_latest

    whole, killed, after = folder / f"whole-zero-{zero}", folder / f"killed-zero-{zero}", KILLED_AFTER[options[0]]
    process = begin([*start(zero, folder, options), f"--name={killed.name}"])
    wait_for(lambda: any(line.get("step", 0) >= after for line in _metrics(metrics, killed)), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"{killed} ended with {process.returncode} before it was killed")
    resumed = int(find_latest(killed).name.removeprefix("step_"))
    finish(begin([str(killed), "--resume"]))
    difference = ""
    try:
        assert_same_run(killed, whole)
    except AssertionError as error:
        difference = str(error)[:500]
    row = {"preset": options[0], "zero_stage": zero, "killed_after": after, "resumed_after": resumed}
    return row | {"same_bits": not difference} | ({"outcome": FAILED, "error": difference} if difference else {})


def begin(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "sgtm", "train", *arguments], cwd=ROOT, env=os.environ)


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise RuntimeError(f"sgtm train ended with {process.returncode}; its output is in the stage's log")


def wait_for(reached, process: subprocess.Popen) -> None:
    ends = time.monotonic() + PATIENCE
    while not reached():
        if process.poll() is not None:
            raise RuntimeError(f"sgtm train ended with {process.returncode} before the step at which it is killed")
        if time.monotonic() > ends:
            process.kill()
            raise RuntimeError(f"sgtm train did not come to that step in {PATIENCE} s")
        time.sleep(0.01)


def _metrics(read, run: Path) -> list[dict]:
    try:
        return read(run)
    except OSError:  # not there yet
        return []


def speed(run: Path) -> float | None:
    """Median of the second half of the run's logged steps."""
    from sgtm.run.metrics import read_metrics

    speeds = [line["tokens_per_second"] for line in read_metrics(run / "metrics.jsonl") if "tokens_per_second" in line]
    return round(statistics.median(speeds[len(speeds) // 2 :]), 1) if speeds else None


if __name__ == "__main__":
    sys.exit(main())
