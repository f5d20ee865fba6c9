"""`sgtm launch`: what it composes is what the scripts of launch/ take, and what cannot run is refused before.

The scripts are the real ones, with stand-ins for the launchers that they call.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgtm.commands.main import main
from sgtm.estimate import launch as launching
from sgtm.estimate.launch import Settled, Where, compose, read_hostfile, settle

ROOT = Path(__file__).parents[2]
NOTE = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n"


def run(folder: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`sgtm launch debug ...` where all launchers only note how they are called."""
    for name in ("torchrun", "deepspeed", "sbatch"):
        (folder / name).write_text(NOTE)
        (folder / name).chmod(0o755)
    search = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    environ = {**os.environ, "PATH": os.pathsep.join(search), "VIRTUAL_ENV": sys.prefix}
    command = [sys.executable, "-m", "sgtm", "launch", "debug", *arguments]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=cwd, env={**environ, **path}, capture_output=True, text=True)


def composed(folder: Path, *arguments: str) -> list[str]:
    """Arguments of the launcher that the script has called; the line before is the command, as a shell reads it."""
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    *_, line = done.stdout.splitlines()
    return json.loads(line)[0][1:]


def test_local(tmp_path):
    arguments = composed(tmp_path, "--gpus", "2", "--train.steps", "30", "--overwrite")
    assert arguments == [
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sgtm",
        "train",
        "debug",
        "--train.steps",
        "30",
        "--overwrite",
    ]


def test_torchrun_over_two_nodes(tmp_path):
    arguments = composed(tmp_path, "--nodes=2", "--gpus=2", "--rendezvous=node-0:29400", "--masking.domains=[es]")
    line = " ".join(arguments)
    assert "--nnodes 2 --nproc-per-node 2" in line and "--rdzv-endpoint node-0:29400" in line
    assert arguments[-5:] == ["-m", "sgtm", "train", "debug", "--masking.domains=[es]"]


def test_deepspeed_by_a_hostfile(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nnode-0 slots=2\n\nnode-1 slots=2  # the other\n")
    arguments = composed(tmp_path, "--hostfile", str(hosts), "--resume")
    port = ["--master_port", "29500"]
    assert arguments == ["--hostfile", str(hosts), *port, "--module", "sgtm", "train", "debug", "--resume"]


def test_slurm(tmp_path):
    arguments = composed(tmp_path, "--launcher", "slurm", "--nodes", "2", "--gpus", "2", "--memory", "80")
    shape = ["--nodes", "2", "--gpus-per-node", "2", "--ntasks-per-node", "2"]
    assert arguments == [*shape, "launch/slurm.sbatch", "debug"]
    done = run(tmp_path, "--launcher=slurm", "--gpus=1", cwd=tmp_path)
    assert done.returncode == 2 and f"submits from the repository, where launch/ is: cd {ROOT}" in done.stderr


def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launching.os, "execvpe", lambda *args: pytest.fail("started"))
    options = ["--nodes=2", "--gpus=2", "--rendezvous=node-0:1", "--memory=80"]
    assert main(["launch", "debug", "--dry-run", "--data.path=my data", *options]) == 0
    printed = capsys.readouterr().out
    assert "512 tokens per step = 4 ranks x 1 accumulation x 2 sequences x 64 tokens" in printed
    assert "ZeRO 1: fits into 80.0 GB, --memory" in printed
    command, note = printed.splitlines()[-2:]
    words = shlex.split(command)
    assert words[:3] == ["NNODES=2", "RDZV=node-0:1", "NPROC=2"] and "--data.path=my data" in words
    assert words[3] == str(ROOT / "launch" / "torchrun.sh") and note == "the same command on each of the 2 nodes"
    monkeypatch.chdir(ROOT)
    assert main(["launch", "debug", "--dry-run", "--launcher=slurm", "--gpus=1"]) == 0
    assert "ZeRO 1: memory not checked: give --memory GB" in capsys.readouterr().out


def test_a_run_directory_is_launched_with_its_own_config(tmp_path, monkeypatch, capsys):
    from sgtm.config import load_config, save_config

    save_config(load_config("debug", ["--train.micro_batch=4"]), tmp_path / "config.yaml")
    assert main(["launch", str(tmp_path), "--dry-run", "--resume", "--gpus=2"]) == 0
    printed = capsys.readouterr().out
    assert "2 ranks x 1 accumulation x 4 sequences" in printed and f"local.sh {tmp_path} --resume" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gpus=3"],
            "3 ranks x train.micro_batch 2; train.tokens_per_step 384 or 768 would, and so would 1 or 2 ranks",
        ),
        (["--gpus=8"], "8 ranks x train.micro_batch 2; train.micro_batch 1 would"),
        (["--memory=0.0001"], "distributed.zero_stage 1 with train.micro_batch 2 on 1 rank needs about 2.3 MB on each"),
        (
            ["--gpus=4", "--distributed.zero_stage=3", "--distributed.zero_hpz_partition_size=3", "--memory=80"],
            "distributed.zero_hpz_partition_size 3 does not divide the number of ranks 4",
        ),
        (["--nodes=2"], "--launcher torchrun needs --rendezvous HOST:PORT"),
        (["--nodes=2", "--launcher=local"], "--launcher local is one machine, but --nodes is 2"),
        (["--nodes=2", "--launcher=deepspeed"], "--launcher deepspeed over 2 nodes needs --hostfile FILE"),
        (["--resume", "--overwrite"], "--resume continues a run and --overwrite deletes it"),
        (["--launcher=slurm"], "--launcher slurm needs --gpus N"),
        (["--launcher=local", "--rendezvous=a:1"], "--rendezvous belongs to --launcher torchrun, not to local"),
        (["--launcher=slurm", "--hostfile=hosts"], "--hostfile belongs to --launcher deepspeed, not to slurm"),
    ],
)
def test_what_cannot_run_is_refused(options, message, capsys, monkeypatch):
    monkeypatch.setattr(launching.os, "execvpe", lambda *args: pytest.fail("started"))
    assert main(["launch", "debug", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_the_memory_of_this_machine_is_shared_by_its_processes(monkeypatch, capsys):
    monkeypatch.setattr(launching.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 8_000_000})())
    assert main(["launch", "debug", "--gpus=1", "--dry-run"]) == 0
    assert main(["launch", "debug", "--gpus=4", "--dry-run"]) == 2
    refused = capsys.readouterr().err
    assert "more than the 2.0 MB of this machine's memory over 4 ranks (for another: --memory GB)" in refused


def test_the_memory_of_a_login_node_says_nothing_of_the_others(monkeypatch, capsys):
    monkeypatch.setattr(launching.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 8_000})())
    several = ["launch", "debug", "--dry-run", "--nodes=2", "--gpus=2", "--rendezvous=node-0:1"]
    assert main(several) == 0
    printed = capsys.readouterr().out
    assert "memory of a rank, MB\n" in printed.replace(" \n", "\n").replace("  ", "")
    assert "ZeRO 1: memory not checked: give --memory GB" in printed
    assert main([*several, "--memory=0.001"]) == 2
    monkeypatch.setattr(launching, "_gpus_here", lambda: 2)
    device = type("Device", (), {"total_memory": 1_000_000, "name": "GPU"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert main(several) == 2
    assert "more than the 1.0 MB of the GPU here (for another: --memory GB)" in capsys.readouterr().err


def test_data_that_are_not_here_are_a_warning(tmp_path, capsys):
    options = ["launch", "debug", "--dry-run", "--gpus=1"]
    assert main([*options, f"--data.path={tmp_path / 'none'}"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"warning: data.path {tmp_path / 'none'} does not exist here; every node needs it\n"
    assert "local.sh" in printed.out
    for path in (tmp_path, "synthetic"):
        assert main([*options, f"--data.path={path}"]) == 0
        assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("node-0\n", "line 1: found 'node-0'"),
        ("node-0 slots=8\nnode-0 slots=8\n", "line 2"),
        ("node-0 slots=many\n", "line 1"),
        ("# none\n", "names no node"),
    ],
)
def test_a_hostfile_that_says_nothing(text, problem, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=problem):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_is_the_run(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4\nb slots=4\n")
    asked = Where(hostfile=hosts)
    assert settle(asked) == Settled("deepspeed", 2, 4, asked)
    for where in (Where(nodes=3, hostfile=hosts), Where(gpus=8, hostfile=hosts)):
        with pytest.raises(ValueError, match="2 nodes with 4, 4 slots, but the run has"):
            settle(where)
    hosts.write_text("a slots=4\nb slots=2\n")
    with pytest.raises(ValueError, match="2 nodes with 4, 2 slots"):
        settle(Where(hostfile=hosts))


def test_a_wheel_has_no_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "SCRIPTS", tmp_path / "launch")
    with pytest.raises(ValueError, match="needs a checkout of the repository"):
        compose(settle(Where(gpus=1)), [])
