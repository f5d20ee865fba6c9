"""`sgtm estimate`: a row for every stage, printed and as JSON, and what it refuses."""

import io
import json

import pytest
from rich.console import Console

from sgtm.commands.main import main
from sgtm.config import load_config
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import estimate
from sgtm.estimate.terminal import print_estimate

HPZ = ("--distributed.zero_stage=3", "--distributed.zero_hpz_partition_size=4")


def test_the_command_prints_a_row_for_every_stage(capsys):
    assert main(["estimate", "--nodes", "64", "--gpus", "8", "--preset", "llama-7b"]) == 0
    printed = capsys.readouterr().out
    assert f"{6_738_415_616 + 2 * 32_000 * 4096:,} parameters" in printed and "512 ranks = 64 nodes x 8" in printed
    assert main(["estimate", "llama-7b", "--nodes", "64", "--gpus", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["zero_stage"] for row in report["stages"]] == [0, 1, 2, 3] and report["accumulation"] == 1
    wide = Console(width=80, record=True, file=io.StringIO())
    machine = Machine(64, 8)
    print_estimate(config := load_config("llama-7b"), machine, estimate(config, machine), wide)
    text = wide.export_text()
    for row in report["stages"]:
        lines = [line.split() for line in text.splitlines() if line.split()[:1] == [str(row["zero_stage"])]]
        memory_line, *_, speed_line, run_line = lines
        assert f"{row['peak_bytes'] / 1e9:.2f}" in memory_line
        assert f"{row['sent_bytes_per_rank'] / 1e9:.2f}" == speed_line[1]
        assert f"{row['speed']['utilisation']:.1%}" == run_line[2]
        assert [f"{row['whole']['days']:.2f}", f"{row['best']['days']:.2f}"] == run_line[3:5]
        assert run_line[-2:] == [f"{row['checkpoint_bytes'] / 1e9:.1f}", "GB"]
    assert report["recommended_zero_stage"] == 1 and report["steps"] == 36_000
    assert max(map(len, text.splitlines()[:40])) > 80 and not any("…" in line for line in text.splitlines())


def test_every_number_of_the_machine_is_used(capsys):
    machine = {"nodes": 2, "gpus": 4, "memory": 7.0, "tflops": 8.0, "inside": 9.0, "between": 10.0}
    machine |= {"reached": 0.25, "sustained": 0.5}
    assert set(machine) == set(Machine.__dataclass_fields__)
    options = [f"--{name}={value}" for name, value in machine.items()]
    assert main(["estimate", "debug", *options, "--train.micro_batch=1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"] == machine and report["accumulation"] == 1


@pytest.mark.parametrize("arguments", ["estimate", "estimate debug --preset debug", "launch --dry-run"])
def test_one_config_is_named(arguments, capsys):
    assert main(arguments.split()) == 2
    assert "name one config" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--nodes=0", "--memory=-1", "--tflops=fast", "--memory=inf"])
def test_numbers_are_above_zero(option, capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "debug", option])
    assert "above 0, got" in capsys.readouterr().err
