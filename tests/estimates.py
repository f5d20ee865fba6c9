"""The printed estimate of a config."""

import io

from rich.console import Console

from sgtm.config import Config
from sgtm.estimate.speed import Machine
from sgtm.estimate.stages import estimate
from sgtm.estimate.terminal import print_estimate


def printed_estimate(config: Config, machine: Machine, width: int = 120) -> str:
    wide = Console(width=width, record=True, file=io.StringIO())
    print_estimate(config, machine, estimate(config, machine), wide)
    return wide.export_text()
