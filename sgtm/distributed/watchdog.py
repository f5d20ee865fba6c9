"""Reports a rank that hangs or dies, then ends the run.

A thread in every rank writes the rank's phase and step to the store of the process group each second, and reads there
whether the run is ending. It takes no part in collectives and does not use the device, so it works while the main
thread waits in one. The run ends when a rank has not moved for `distributed.timeout_minutes` (every rank that is alive
prints where it waits and where the others are) or has died (its own error comes first; each other rank prints one line
that names it).

Time is counted in beats of this thread, not by the wall clock: a job that was suspended continues when it is woken.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TypedDict

import torch.distributed as dist

from sgtm.distributed.guard import Guard

BEAT = 1.0  # seconds
LISTEN = 3 * BEAT  # a rank without a new beat for so long is dead or stopped
GONE, LEFT, END = "gone", "left", "end"
NO_STORE = "the store of the run does not answer: rank 0 or its launcher has ended, or the network is down"
PATIENCE = 10 * LISTEN  # for a store that fails, or, beyond the limit, for a call to it that does not return

_watchdog: Watchdog | None = None


class ProcessInfo(TypedDict):
    """Where a rank runs. machine: as of `_machine`."""

    host: str
    pid: int
    machine: str


class State(ProcessInfo):
    """A beat of a rank, as JSON in the store. waited: seconds in this phase of this step."""

    beats: int
    phase: str | None
    step: int
    waited: float


class Note(TypedDict):
    """Why the run ends, as JSON in the store. cause: GONE or END. rank: whose fault it is, where that is known."""

    cause: str
    rank: int | None
    text: str


def enter(phase: str | None, step: int | None = None) -> None:
    """Set the phase of the main thread, and the step, counted from 1. Phase None: nothing that other ranks wait for."""
    if _watchdog is not None:
        _watchdog.phase_and_step = (phase, _watchdog.phase_and_step[1] if step is None else step)


def start(rank: int, world_size: int, minutes: float) -> None:
    """Watch this rank, one of a process group that is up, from now on."""
    global _watchdog
    store = _connect()
    _watchdog = Watchdog(store, rank, world_size, 60 * minutes, _neighbours(store, rank, world_size))


def started() -> bool:
    return _watchdog is not None


def leave(status: int) -> None:
    """End the watch of this rank. A status other than 0 ends the run."""
    if _watchdog is not None:
        _watchdog.leave(status)


class Watchdog:
    """See above.

    store       of the ranks, for this alone
    limit       seconds that a rank may stay in one phase of a step
    neighbours  the other ranks of this machine
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, limit: float, neighbours: dict[int, ProcessInfo]):
        self.store, self.rank, self.world_size, self.limit = store, rank, world_size, limit
        self.phase_and_step: tuple[str | None, int] = ("start", 0)
        self.waited = 0.0
        self.failing = 0.0  # seconds since the store last worked
        self.beats = 0
        self.exiting, self.stopped = threading.Lock(), threading.Event()
        self.me, self.neighbours = _process_info(), neighbours
        self.previous, sys.excepthook = sys.excepthook, self._excepthook
        faulthandler.enable()  # a crash in C shows its stack
        self.silence = 0.0  # seconds since a call to the store last returned, with an error or without
        self.outside = Guard(limit + 60)  # should all threads be held up, by C code that keeps the interpreter
        self.thread = threading.Thread(target=self._watch, name="sgtm-watchdog", daemon=True)
        self.thread.start()
        threading.Thread(target=self._guard, name="sgtm-watchdog-guard", daemon=True).start()

    def leave(self, status: int) -> None:
        if self.stopped.is_set():
            return
        if status:
            with suppress(RuntimeError):  # the store is gone, and the run with it
                self._end_run(GONE, self.rank, f"ended with exit status {status}")
        self.stopped.set()
        self.thread.join(LISTEN)  # its last beat must not overwrite LEFT, and the interpreter must outlive it
        with suppress(RuntimeError):
            self.store.set(str(self.rank), LEFT)
        self.outside.leave()

    def _watch(self) -> None:
        seen, last, listened = self.phase_and_step, time.monotonic(), 0.0
        note: Note | None = None
        before: dict[int, State | None] = {}
        while not self.stopped.wait(BEAT):
            now, phase_and_step, self.silence = time.monotonic(), self.phase_and_step, 0.0
            passed, last = min(now - last, 5 * BEAT), now
            self.waited = self.waited + passed if phase_and_step is seen and phase_and_step[0] is not None else 0.0
            seen = phase_and_step
            self.outside.beat()
            try:
                self._beat()
                self.failing = 0.0
                if phase_and_step[0] is None:  # this rank has done its part
                    continue
                if note is None:
                    note, listened = self._note() or self._dead_neighbour() or self._stuck(), 0.0
                    before = self._states() if note else {}
                listened += passed
                if note and listened > LISTEN:
                    self._end(note, before)
            except RuntimeError:
                self.failing += passed
                if phase_and_step[0] is not None:
                    if self.failing > LISTEN:  # the system still shows who has died
                        note = note or self._dead_neighbour()
                    if note or self.failing > PATIENCE:
                        self._end(note or {"cause": GONE, "rank": None, "text": NO_STORE}, None)
                with suppress(RuntimeError):
                    self.store = _clone(self.store)

    def _guard(self) -> None:
        """Where the network is cut, a call to the store may not return for minutes, and this thread makes none."""
        last = time.monotonic()
        while not self.stopped.wait(BEAT):
            now = time.monotonic()
            passed, last = min(now - last, 5 * BEAT), now
            self.silence = self.silence + passed if self.phase_and_step[0] is not None else 0.0
            if self.silence > self.limit + PATIENCE:
                self._exit_with(self._lost({"cause": GONE, "rank": None, "text": NO_STORE}))

    def _beat(self) -> None:
        self.beats += 1
        phase, step = self.phase_and_step
        state: State = {**self.me, "beats": self.beats, "phase": phase, "step": step, "waited": self.waited}
        self.store.set(str(self.rank), json.dumps(state))

    def _note(self) -> Note | None:
        """Why the run ends; None while it does not."""
        return json.loads(self.store.get(END)) if self.store.check([END]) else None

    def _end_run(self, cause: str, rank: int | None, text: str) -> Note:
        """Write why the run ends, for all ranks; the first note wins."""
        note = json.dumps({"cause": cause, "rank": rank, "text": text})
        return json.loads(self.store.compare_set(END, "", note))

    def _stuck(self) -> Note | None:
        return self._end_run(END, self.rank, "the run hangs") if self.waited > self.limit else None

    def _states(self) -> dict[int, State | None]:
        """The last beat of each rank that has not left. None: no beat yet."""
        texts = {r: self.store.get(str(r)) if self.store.check([str(r)]) else b"null" for r in range(self.world_size)}
        return {rank: json.loads(text) for rank, text in texts.items() if text != LEFT.encode()}

    def _dead_neighbour(self) -> Note | None:
        """A rank of this machine whose process is gone though it has not left."""
        for rank, process in self.neighbours.items():
            how = _death(process["pid"])
            if how:
                text = f"{how} (pid {process['pid']} on {process['host']})"
                try:
                    if not self.store.check([str(rank)]) or self.store.get(str(rank)) != LEFT.encode():
                        return self._note() or self._end_run(GONE, rank, text)
                except RuntimeError:  # it held the store
                    return {"cause": GONE, "rank": rank, "text": text}
        return None

    def _excepthook(self, exception: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print one line where this rank has lost another; else the traceback, before the others read the note."""
        if not _connection_lost(error):
            self.previous(exception, error, trace)
            first = (str(error).splitlines() or [""])[0]
            with suppress(RuntimeError):
                self._end_run(GONE, self.rank, f"{exception.__name__}: {first}")
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it to all that are left
        note: Note | None = None
        until = time.monotonic() + LISTEN
        try:
            before = self._states()
            while note is None and time.monotonic() < until:
                note = self._note() or self._dead_neighbour()
                time.sleep(BEAT / 50)
            if note is None:
                silent = self._silent(before)
                who = f"no sign of life from {_ranks(silent)}; " if silent else ""
                note = {"cause": GONE, "rank": None, "text": f"{who}{str(error).splitlines()[0]}"}
        except RuntimeError:
            time.sleep(BEAT)
            note = self._dead_neighbour() or {"cause": GONE, "rank": None, "text": NO_STORE}
        if note["cause"] == END:
            time.sleep(4 * LISTEN)  # the watchdog thread prints the diagnosis and ends this process
        self._exit_with(self._lost(note))

    def _end(self, note: Note, before: dict[int, State | None] | None) -> NoReturn:
        """End this rank from the watchdog thread; before: states some beats ago."""
        if note["cause"] == GONE or before is None:
            self._exit_with(self._lost(note))
        silent = self._silent(before)
        self._exit_with(self._diagnosis(silent), silent)

    def _lost(self, note: Note) -> str:
        who = "another rank" if note["rank"] is None else f"rank {note['rank']}"
        return f"error: rank {self.rank}: lost {who}: {note['text']}"

    def _silent(self, before: dict[int, State | None]) -> list[int]:
        return [rank for rank, state in self._states().items() if state == before.get(rank) and rank != self.rank]

    def _wake(self, silent: list[int]) -> None:
        """End the silent ranks of this machine, each with its stack: a launcher waits long for one that is stopped."""
        on_host = {self.rank, *self.neighbours}
        if self.rank == min(on_host - set(silent)):
            for rank in on_host & set(silent):
                with suppress(ProcessLookupError):
                    os.write(2, f"rank {self.rank} ends rank {rank}, which was here:\n".encode())
                    os.kill(self.neighbours[rank]["pid"], signal.SIGABRT)
                    os.kill(self.neighbours[rank]["pid"], signal.SIGCONT)
                    time.sleep(BEAT / 4)  # one stack after the other

    def _diagnosis(self, silent: list[int]) -> str:
        """The text that every rank prints when the run hangs."""
        where: dict[str, list[int]] = {}
        for rank, state in self._states().items():
            if rank != self.rank:
                text = f"step {state['step']}, {state['phase']}" if state else "not started"
                if state and rank in silent:
                    text = f"last heard of in {text}; no sign of life (pid {state['pid']} on {state['host']})"
                where.setdefault(text, []).append(rank)
        phase, step = self.phase_and_step
        main = threading.main_thread().ident
        assert main is not None  # it has begun
        stack = traceback.format_stack(sys._current_frames()[main])
        return "".join(
            [
                f"error: rank {self.rank}: the run hangs: {self.waited / 60:.1f} minutes in step {step}, {phase} "
                f"(distributed.timeout_minutes {self.limit / 60:g})\n",
                *(f"  {_ranks(ranks)}: {text}\n" for text, ranks in where.items()),
                f"rank {self.rank} waits here:\n",
                *stack,
            ]
        ).rstrip("\n")

    def _exit_with(self, text: str, silent: list[int] | None = None) -> NoReturn:
        """Print the final error once per rank, then exit with status 1.

        silent  ranks without a new beat, where the run hangs: wait until the other ranks have printed theirs, which
                this exit would change, then end the silent ones of this machine
        """
        with self.exiting:
            os.write(2, f"{text}\n".replace("\n  ", f"\n[rank{self.rank}]:   ").encode())
            if silent is not None:
                time.sleep(LISTEN)
                self._wake(silent)
            os._exit(1)


def _connection_lost(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _ranks(ranks: Iterable[int]) -> str:
    numbers = list(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _connect() -> dist.Store:
    """The store of the process group by a connection of its own: the main thread may block the other."""
    store = dist.PrefixStore("watchdog", _clone(dist.distributed_c10d._get_default_store()))
    store.set_timeout(timedelta(seconds=LISTEN))  # a clone tries to connect for so long, or twice that
    return store


def _neighbours(store: dist.Store, rank: int, world_size: int) -> dict[int, ProcessInfo]:
    """The other ranks of this machine; none where a rank does not come."""
    keys = [f"process of {other}" for other in range(world_size)]
    with suppress(RuntimeError):
        store.set(keys[rank], json.dumps(_process_info()))
        store.wait(keys, timedelta(seconds=PATIENCE))
        processes = {other: json.loads(store.get(key)) for other, key in enumerate(keys) if other != rank}
        return {other: process for other, process in processes.items() if process["machine"] == _machine()}
    return {}


def _process_info() -> ProcessInfo:
    return {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine()}


def _clone(store: dist.Store) -> dist.Store:
    return store.clone()  # type: ignore[attr-defined]  # missing in torch's stub


def _machine() -> str:
    """Equal for processes that see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def _death(pid: int) -> str:
    """How a process of this machine has ended, as far as /proc shows; empty for one that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "ended with an unknown exit status"
    if fields[0] not in "ZX":
        return ""
    code = int(fields[49]) if len(fields) > 49 else 0  # exit_code of proc(5), which only its own user may read
    number = code & 0x7F
    return f"killed by {signal.Signals(number).name}" if number else f"ended with exit status {code >> 8}"
