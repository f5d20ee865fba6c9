"""Times of a trace at the borders of ranges; tests/processes/test_profile.py has whole traces."""

from __future__ import annotations

from sgtm.measure.trace import Work, cpu_work, summarize


def event(cat: str, name: str, start: float, end: float, tid: int = 1, pid: int = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "pid": pid, "args": {}}


def test_a_phase_ends_where_the_next_begins():
    phases = [event("user_annotation", "forward", 10, 20), event("user_annotation", "backward", 20, 30)]
    ops = [event("cpu_op", f"op{start}", start, start + 1, tid=2) for start in (9, 10, 19, 20, 30)]
    assert [(work.name, work.phase) for work in cpu_work([*phases, *ops])] == [
        ("op9", "other"), ("op10", "forward"), ("op19", "forward"), ("op20", "backward"), ("op30", "other"),
    ]  # fmt: skip


def test_ranges_hold_what_lies_in_them_on_their_own_thread_of_their_own_process():
    events = [
        event("user_annotation", "mlp", 0, 10), event("cpu_op", "inside", 2, 4), event("cpu_op", "after", 10, 12),
        event("cpu_op", "thread", 2, 5, tid=2), event("cpu_op", "process", 2, 6, pid=2),
    ]  # fmt: skip
    assert set(cpu_work(events)) == {
        Work("inside", "other", "mlp", 2), Work("after", "other", "other", 2), Work("thread", "other", "other", 3),
        Work("process", "other", "other", 4),
    }  # fmt: skip


def test_the_longest_comes_first_and_shares_are_of_all():
    ops = [event("cpu_op", name, start, start + took) for name, start, took in (("a", 0, 1), ("b", 5, 6), ("a", 20, 1))]
    summary = summarize(ops, steps=4, seconds=0.002, on_gpu=False)
    assert [(row["name"], row["calls_per_step"], row["share"]) for row in summary["kernels"]] == [
        ("b", 0.25, 0.75), ("a", 0.5, 0.25),
    ]  # fmt: skip
    assert (summary["ms_per_step"], summary["kernel_ms_per_step"], summary["steps"]) == (0.5, 0.002, 4)
