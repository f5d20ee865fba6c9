"""`sgtm demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgtm.commands.options import DATA, Subcommands

PORT = 8420


def port(text: str) -> int:
    """The type of `--port`."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port, 0 to 65535, got {text!r}")
    return int(text)


def add(commands: Subcommands) -> None:
    about = "a local page to switch the domains of a run off and see completions and token losses change"
    usage = "%(prog)s RUN [--port P] [--host ADDRESS] [--data.path DIR] [-h]"
    parser = commands.add("demo", run, about, usage=usage)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, e.g. runs/quickstart")
    any_free = f"0 takes any that is free (default: {PORT})"
    parser.add_argument("--port", type=port, default=PORT, metavar="P", help=any_free)
    host = "address to listen on; any but this machine's own lets others use the model (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=host)
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.inference.sources import ModelSource
    from sgtm.run.located import check_run

    config = check_run(options.run_dir, options.data_path)  # before anything heavy is imported
    from sgtm.demo.server import serve

    serve(ModelSource(options.run_dir, config, options.data_path), options.host, options.port)
