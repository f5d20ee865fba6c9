"""`adapted.json` of a run directory that `sgtm adapt` has made: from which run, and how.

domain      whose adapters the run has; forget, retain: categories whose text was read, of the split train
options     rank, alpha, retain_weight; steps, lr, seed, batch (sequences of forget and of retain text in a step)
parameters  numbers in the adapters; tokens: targets of forget and of retain text that the steps have read
seen        whether the source was itself trained on text of the domain, and is no base that never saw it
source      run (its name), checkpoint, step, manifest_sha256 of that checkpoint, and, where that run was unlearned, its
            `unlearned`
"""

from __future__ import annotations

from pathlib import Path

from sgtm.run.origin import read_record, write_record
from sgtm.words import counted

FILE = "adapted.json"


def write_adapted(run: Path, record: dict) -> None:
    write_record(run / FILE, record)


def read_adapted(run: Path | str) -> dict | None:
    """None for a run without adapters. Raises ValueError for a damaged file."""
    return read_record(Path(run) / FILE, described_adapters, "adapt the source again")


def described_adapters(record: dict) -> str:
    """One sentence, and a second where the base has seen the domain; code words in backticks."""
    options, source, domain = record["options"], record["source"], record["domain"]
    others = ", ".join(f"{name} {value:g}" for name, value in options.items() if name != "rank")
    sentence = (
        f"Adapted: `{domain}` by adapters of rank {options['rank']} ({others}), {counted(record['steps'], 'step')} at "
        f"learning rate {record['lr']:.3g}, seed {record['seed']}, from run `{source['run']}` after step "
        f"{source['step']:,}; without `{domain}` it is that run."
    )
    return f"{sentence} {seen_sentence(record)}" if record["seen"] else sentence


def seen_sentence(record: dict) -> str:
    """That the base has seen the domain."""
    source, domain = record["source"]["run"], record["domain"]
    return f"`{source}` was trained on text of `{domain}`, so the model without the adapters has seen it."
