"""`sgtm bench`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, Subcommands


def add(commands: Subcommands) -> None:
    about = "measure what masks cost in a training step, in time and memory, on this machine"
    parser = commands.add_configured("bench", run, about)
    parser.add_argument("--rounds", type=COUNT, default=15, metavar="N", help="steps of each row (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object per row")
    parser.add_argument(
        "--peers", action="store_true", help="compare with Hugging Face's model of this shape as well, unmasked"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="first tune the Triton kernels on this GPU at the config's shape (--kernels.backend triton); writes "
        "tuned/<device>.json beside the kernels (sgtm doctor names the folder), which later runs read; SGTM_TUNED=off "
        "undoes it",
    )


def run(options) -> None:
    from sgtm.config import load_config

    config = load_config(options.config, options.overrides)

    from sgtm.measure.bench import bench

    bench(config, options.rounds, options.json, options.tune, options.peers)
