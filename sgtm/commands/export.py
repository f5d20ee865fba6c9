"""`sgtm export`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgtm.commands.options import AMOUNT, DATA, Subcommands


def add(commands: Subcommands) -> None:
    about = "write a Hugging Face model, with domains removed or without"
    usage = "%(prog)s RUN --out DIR [--remove DOMAIN [DOMAIN ...]] [options]"
    parser = commands.add("export", run, about, usage=usage)
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    about = "domains to remove, as bio chem or bio,chem (default: none)"
    parser.add_argument("--remove", nargs="+", default=[], metavar="DOMAIN", help=about)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    about = "a domain at a part of its strength, above 0 and below 1, as bio=0.5: not a safe model"
    parser.add_argument("--strength", nargs="+", default=[], type=_strength, metavar="DOMAIN=S", help=about)
    about = "keep the shape of the full model: removed heads and neurons are zeros (default: cut out)"
    parser.add_argument("--zeroed", action="store_true", help=about)
    about = "of the weights (default: fp32; bf16 rounds them and halves the files)"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=about)
    about = "most bytes in a file of weights, in GB (default: 2); a larger tensor has a file to itself"
    parser.add_argument("--shard", type=AMOUNT, default=2.0, metavar="GB", help=about)
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.config.load import load_run_config

    load_run_config(options.run_dir)  # before anything heavy is imported
    from sgtm.hf.export import export_run

    remove = [domain for words in options.remove for domain in words.split(",") if domain]  # no name has a comma
    export_run(
        options.run_dir,
        remove,
        options.out,
        options.data_path,
        strengths=dict(options.strength),
        prune=not options.zeroed,
        dtype=options.dtype,
        shard=max(1, round(options.shard * 1e9)),
    )
    print(options.out)


def _strength(text: str) -> tuple[str, float]:
    domain, _, number = text.rpartition("=")
    try:
        strength = float(number)
    except ValueError:
        strength = 0.0
    if not domain or not 0 < strength < 1:
        raise argparse.ArgumentTypeError(f"expected DOMAIN=S with S above 0 and below 1, got {text!r}")
    return domain, strength
