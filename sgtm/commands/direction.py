"""`sgtm direction`."""

from __future__ import annotations

from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands, natural


def add(commands: Subcommands) -> None:
    parser = commands.add("direction", run, "a domain's direction in the residual stream, for steering.direction")
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="run directory, mostly of an unmasked run")
    parser.add_argument("--domain", metavar="DOMAIN", help="domain (default: the run's only one)")
    layer = "block, from 0, that steering.layer null takes (default: half of the depth); the file has all of them"
    parser.add_argument("--layer", type=natural, metavar="L", help=layer)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, *.safetensors")
    sequences = "sequences of forget and of retain text (default: 512, or all where there are fewer)"
    parser.add_argument("--sequences", type=COUNT, metavar="N", help=sequences)
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> None:
    from sgtm.run.located import check_run

    check_run(options.run_dir, options.data_path)  # before anything heavy is imported
    from sgtm.unlearning.mean_difference import described, direction_of_text

    record = direction_of_text(
        options.run_dir,
        options.out,
        domain=options.domain,
        layer=options.layer,
        sequences=options.sequences,
        data=options.data_path,
    )
    print(described(record))
    print(f"done: {options.out}; next: sgtm train CONFIG --steering.direction {options.out}")
