"""`sgtm audit`."""

from __future__ import annotations

import json
from pathlib import Path

from sgtm.commands.options import COUNT, DATA, Subcommands, check_output

CHECKS = ("files", "checkpoint", "facts", "config", "tokenizer", "tensors", "removed", "logits", "losses")


def add(commands: Subcommands) -> None:
    parser = commands.add("audit", run, "hold an exported folder against the run that it was made from")
    parser.description = (
        "Checks that an exported folder holds nothing of the removed groups, that every tensor and file is accounted "
        "for, and that the model computes what its card says. Exit status 1 where something is wrong."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder written by sgtm export")
    parser.add_argument("--against", type=Path, required=True, metavar="RUN", help="run directory that it is of")
    about = "leave checks out; logits and losses run the model, which needs memory for two"
    parser.add_argument("--skip", nargs="+", default=[], choices=CHECKS, metavar="CHECK", help=f"{about}: %(choices)s")
    about = "train the last N steps again with random tokens for the removed domains' text, and compare the safe model"
    parser.add_argument("--replay", type=COUNT, metavar="N", help=f"{about} (certified runs)")
    about = "write the hash chain run, checkpoint, export; sha256sum -c FILE checks it"
    parser.add_argument("--chain", type=Path, metavar="FILE", help=about)
    parser.add_argument("--json", action="store_true", help="print JSON in place of lines")
    parser.add_argument("--data.path", dest="data_path", metavar="DIR", help=DATA)


def run(options) -> int:
    from sgtm.config.load import load_run_config

    load_run_config(options.against)  # before anything heavy is imported
    if options.chain:
        check_output("--chain", options.chain, options.folder, options.against)
    from sgtm.audit.audit import audit_export
    from sgtm.audit.report import as_json, chain_text, print_check, print_outcome

    note = (lambda check: None) if options.json else print_check
    audit = audit_export(options.folder, options.against, options.data_path, skip=options.skip, note=note)
    if options.replay:
        from sgtm.audit.replay import replayed

        check = replayed(audit, options.replay, options.data_path)
        audit.checks.append(check)
        note(check)
    if options.chain:
        options.chain.write_text(chain_text(audit), encoding="utf-8")
    if options.json:
        print(json.dumps(as_json(audit), indent=1))
    else:
        print_outcome(audit)
    return 0 if audit.passed else 1
