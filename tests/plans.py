"""The printed plan of a config."""

import io

from rich.console import Console

from sgtm.config import Config
from sgtm.plan.rows import plan
from sgtm.plan.speed import Machine
from sgtm.plan.terminal import print_plan


def printed_plan(config: Config, machine: Machine, width: int = 120) -> str:
    wide = Console(width=width, record=True, file=io.StringIO())
    print_plan(config, machine, plan(config, machine), wide)
    return wide.export_text()
