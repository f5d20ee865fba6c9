"""An audit for people, for programs, and for `sha256sum`."""

from __future__ import annotations

from sgtm.audit.audit import Audit
from sgtm.audit.check import Check
from sgtm.words import counted


def print_check(check: Check) -> None:
    reason = f" ({check.skipped})" if check.skipped else ""
    print(f"{check.name:<12}{check.outcome:<9}{check.about}{reason}", flush=True)
    for problem in check.problems:
        print(f"{'':12}- {problem}")


def print_outcome(audit: Audit) -> None:
    failed = [check for check in audit.checks if not check.passed]
    skipped = [check.name for check in audit.checks if check.skipped and check.passed]
    removed = ", ".join(audit.record["removed"]) or "nothing"
    if failed:
        problems = counted(sum(len(check.problems) for check in failed), "problem")
        print(f"\n{audit.folder} is NOT the export of {audit.run} that it claims to be: {problems}")
        return
    print(f"\n{audit.folder} is {audit.run} without {removed}, {audit.record['checkpoint']['name']}")
    if audit.record["reduced"]:
        print(f"not a safe model: it holds {', '.join(audit.record['reduced'])}")
    if skipped:
        print(f"not checked: {', '.join(skipped)}")
    print(f"\n{chain_text(audit)}", end="")


def chain_text(audit: Audit) -> str:
    """Lines that `sha256sum -c` takes, from the working directory that the audit ran in."""
    return "".join(f"{digest}  {path}\n" for digest, path in audit.chain)


def as_json(audit: Audit) -> dict:
    """`passed`, the checks with their problems, and the hash chain."""
    return {
        "folder": str(audit.folder),
        "run": str(audit.run),
        "passed": audit.passed,
        "removed": audit.record["removed"],
        "reduced": audit.record["reduced"],
        "checks": [
            {"name": c.name, "outcome": c.outcome, "about": c.about, "problems": c.problems, "skipped": c.skipped}
            for c in audit.checks
        ],
        "chain": [{"sha256": digest, "file": str(path)} for digest, path in audit.chain],
    }
