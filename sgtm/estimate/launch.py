"""`sgtm launch`: the command that starts a run over many ranks, composed and checked before anything is allocated.

The scripts of launch/ do the starting; here are only their environment and arguments.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console

from sgtm.config.schema import Config
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import arithmetic, check_divides, check_fits, estimate
from sgtm.estimate.terminal import print_memory
from sgtm.estimate.units import GB, amount
from sgtm.words import counted

SCRIPTS = Path(__file__).parents[2] / "launch"
LAUNCHERS = ("local", "torchrun", "deepspeed", "slurm")
ANOTHER = "(for another: --memory GB)"


class Where(NamedTuple):
    """Where a run goes; what is None is found out by `settle`.

    launcher    one of LAUNCHERS
    nodes       number of nodes
    gpus        processes on each node: one for each GPU
    rendezvous  HOST:PORT of one of the nodes (torchrun)
    hostfile    nodes and their slots (deepspeed)
    """

    launcher: str | None = None
    nodes: int | None = None
    gpus: int | None = None
    rendezvous: str | None = None
    hostfile: Path | None = None


class Settled(NamedTuple):
    """What was open in `options`, decided."""

    launcher: str
    nodes: int
    gpus: int
    options: Where


def settle(where: Where) -> Settled:
    """Decide what is left open. Raises ValueError for options that do not go together, naming them."""
    launcher, nodes, gpus = where.launcher, where.nodes, where.gpus
    if launcher is None:
        several = "torchrun" if where.rendezvous or (nodes or 1) > 1 else "local"
        launcher = "deepspeed" if where.hostfile else several
    for option, value, owner in (
        ("hostfile", where.hostfile, "deepspeed"),
        ("rendezvous", where.rendezvous, "torchrun"),
    ):
        if value and launcher != owner:
            raise ValueError(f"--{option} belongs to --launcher {owner}, not to {launcher}")
    if where.hostfile:
        slots = read_hostfile(where.hostfile)
        nodes, gpus = nodes or len(slots), gpus or next(iter(slots.values()))
        if len(slots) != nodes or set(slots.values()) != {gpus}:
            raise ValueError(
                f"{where.hostfile}: {counted(len(slots), 'node')} with {', '.join(map(str, slots.values()))} slots, "
                f"but the run has --nodes {nodes} --gpus {gpus}; the launcher starts one rank for each slot"
            )
    nodes = nodes or 1
    if nodes > 1 and launcher == "local":
        raise ValueError(f"--launcher local is one machine, but --nodes is {nodes}; take torchrun, deepspeed or slurm")
    if nodes > 1 and launcher == "deepspeed" and not where.hostfile:
        raise ValueError(f"--launcher deepspeed over {nodes} nodes needs --hostfile FILE; see launch/hostfile.example")
    if launcher == "torchrun" and not where.rendezvous:
        raise ValueError("--launcher torchrun needs --rendezvous HOST:PORT, one of the nodes and the same on all")
    if where.rendezvous and not re.fullmatch(r"([^\s:/]+|\[[0-9a-fA-F:]+\]):\d+", where.rendezvous):
        raise ValueError(f"--rendezvous: found {where.rendezvous!r}, but it takes HOST:PORT, such as node-0:29400")
    port = (where.rendezvous or "").rpartition(":")[2]
    if port.isdigit() and not 0 < int(port) < 2**16:
        raise ValueError(f"--rendezvous: found port {port}, but a port is 1 to 65535")
    if gpus is None:
        if launcher == "slurm":
            raise ValueError("--launcher slurm needs --gpus N: the GPUs of each node, which are not seen from here")
        gpus = max(1, _gpus_here())
    return Settled(launcher, nodes, gpus, where)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by node. Raises ValueError that names file and line."""
    if not path.is_file():
        raise ValueError(f"--hostfile: no such file: {path}; launch/hostfile.example shows one")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        count = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not count.isdigit() or int(count) == 0 or words[0] in slots:
            raise ValueError(
                f"{path}: line {number}: found {line!r}; a line is a node of its own: NAME slots=NUMBER, 1 or more"
            )
        slots[words[0]] = int(count)
    if not slots:
        raise ValueError(f"{path}: names no node; a line is NAME slots=NUMBER")
    return slots


def compose(where: Settled, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """(environment, command) that start `sgtm train ARGUMENTS`.

    Raises ValueError where launch/ is not beside the package, or Slurm would not find it.
    """
    if not SCRIPTS.is_dir():
        raise ValueError(f"{SCRIPTS} does not exist: sgtm launch needs a checkout of the repository, not a wheel")
    nodes, gpus = str(where.nodes), str(where.gpus)
    if where.launcher == "slurm":
        if Path.cwd() != SCRIPTS.parent:
            raise ValueError(f"--launcher slurm submits from the repository, where launch/ is: cd {SCRIPTS.parent}")
        shape = ["--nodes", nodes, "--gpus-per-node", gpus, "--ntasks-per-node", gpus]
        return {}, ["sbatch", *shape, "launch/slurm.sbatch", *arguments]
    environment = {"NPROC": gpus}
    if where.launcher == "torchrun":
        environment = {"NNODES": nodes, "RDZV": str(where.options.rendezvous), "NPROC": gpus}
    elif where.options.hostfile:
        environment = {"HOSTFILE": str(where.options.hostfile)}
    return environment, [str(SCRIPTS / f"{where.launcher}.sh"), *arguments]


def memory_limit(where: Settled, memory: float | None) -> tuple[float, str] | None:
    """(bytes for one rank, whose they are): `memory` in GB, else that of the GPU here, else a share of this machine's.

    None where there is no `memory` and nothing here shows what the ranks will have: under Slurm, and on several nodes
    where this one, perhaps a login node, has no GPU.
    """
    if memory is not None:
        return memory * GB, "--memory"
    gpus = _gpus_here()
    if where.launcher == "slurm" or (where.nodes > 1 and not gpus):
        return None
    if gpus:
        import torch

        device = torch.cuda.get_device_properties(0)
        return device.total_memory, f"the {device.name} here {ANOTHER}"
    shared = f"this machine's memory over {counted(where.gpus, 'rank')} {ANOTHER}"
    return psutil.virtual_memory().total / where.gpus, shared


def launch(config: Config, where: Where, arguments: list[str], memory: float | None, dry_run: bool) -> None:
    """Check and print what is about to be started and, unless `dry_run`, become it: this function does not return.

    arguments  of `sgtm train`, which give `config`
    memory     of a device, GB; None: as `memory_limit` finds
    Raises ValueError for what does not divide or fit, naming what would.
    """
    settled = settle(where)
    machine = Machine(settled.nodes, settled.gpus)
    check_divides(config, machine.ranks)
    limit = memory_limit(settled, memory)
    if limit is not None:
        check_fits(config, machine.ranks, *limit)
    environment, command = compose(settled, arguments)
    if config.data.path != "synthetic" and not Path(config.data.path).exists():
        print(f"warning: data.path {config.data.path} does not exist here; every node needs it", file=sys.stderr)
    _print(config, machine, limit, environment, command)
    if settled.launcher == "torchrun" and settled.nodes > 1:
        print(f"the same command on each of the {settled.nodes} nodes")
    if not dry_run:
        if shutil.which(command[0]) is None:
            raise ValueError(
                f"--launcher {settled.launcher} needs {command[0]}, which is not on the PATH of this machine"
            )
        os.execvpe(command[0], command, os.environ | environment)


def _print(config: Config, machine: Machine, limit, environment: dict[str, str], command: list[str]) -> None:
    console = Console()
    console.print(arithmetic(config, machine), highlight=False, soft_wrap=True)
    rows = estimate(config, machine)
    print_memory(console, rows, None if limit is None else limit[0])
    checked = "memory not checked: give --memory GB" if limit is None else f"fits into {amount(limit[0])}, {limit[1]}"
    console.print(f"ZeRO {config.distributed.zero_stage}: {checked}", highlight=False, soft_wrap=True)
    words = [*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)]
    print(" ".join(words), flush=True)


def _gpus_here() -> int:
    """GPUs that a run started here would use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0

    import torch  # takes seconds, so what is wrong with the config or the options comes before

    return torch.cuda.device_count()
