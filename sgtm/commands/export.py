"""`sgtm export`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import DATA, Subcommands


def add(commands: Subcommands) -> None:
    about = "write a Hugging Face model, with domains removed or without"
    usage = "%(prog)s RUN --out DIR [--remove DOMAIN [DOMAIN ...]] [--data.path DIR] [-h]"
    parser = commands.add("export", run, about, usage=usage)
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    about = "domains to remove, as bio chem or bio,chem (default: none)"
    parser.add_argument("--remove", nargs="+", default=[], metavar="DOMAIN", help=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.config.load import load_run_config

    load_run_config(options.run_dir)  # before anything heavy is imported
    from sgtm.hf.export import export_run

    remove = [domain for words in options.remove for domain in words.split(",") if domain]  # no name has a comma
    export_run(options.run_dir, remove, options.out, options.data_path)
    print(options.out)
