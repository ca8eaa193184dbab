"""Rank processes for tests: started once, then driven through many small functions.

    with RankGroup(4, "cpu") as group:
        results = group.run(function, 1, 2)      # {rank: function(rank_context, 1, 2)}

Each rank is a fresh process (started by a fork server that has torch loaded, so in milliseconds). Every call has a
deadline: when it passes, all ranks print the stacks of all their threads, are killed, and the call fails with what
they printed. A rank that raises or dies fails the call with its traceback or exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

PRELOADED = ["torch", "torch.distributed", "numpy", "pytest"]
GRACE_S = 3.0  # what the other ranks get to end by themselves once one has failed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)
_groups = itertools.count()


class RankFailure(AssertionError):
    """A rank raised, died or did not come back in time; the text says which and shows what it printed."""


@dataclass
class Rank:
    """What a function running in a rank process gets as its first argument."""

    rank: int
    device: str
    store_port: int
    progress: Any  # one int64 a rank, shared with the parent
    ending: Any  # int64 [2], shared: whether the parent wants the running call to end, and after which operation it does
    call: int = 0  # number of the running call, equal on all of its ranks
    state: dict = field(default_factory=dict)  # stays between calls
    _meeting: Any = None  # (call, its store)

    def store(self, prefix: str | None = None):
        """A PrefixStore on the group's torch TCPStore; the default prefix is the running call's own.

        Each has a connection of its own: a client that waits for a key keeps other threads from using it.
        """
        import torch.distributed as dist

        client = dist.TCPStore("127.0.0.1", self.store_port, is_master=False, wait_for_workers=False)
        return dist.PrefixStore(prefix if prefix is not None else f"call{self.call}", client)

    def meet(self, name: str, ranks) -> None:
        """Returns once all of `ranks` are here; a name serves once a call."""
        if self._meeting is None or self._meeting[0] != self.call:
            self._meeting = self.call, self.store()
        store = self._meeting[1]
        store.set(f"meet/{name}/{self.rank}", b"here")
        store.wait([f"meet/{name}/{other}" for other in ranks])


@dataclass
class Pending:
    """A call under way. `wait` gives {rank: result} of the ranks that were neither killed nor stopped by the test."""

    group: RankGroup
    name: str
    waiting: set[int]
    results: dict[int, Any] = field(default_factory=dict)

    def wait(self, timeout: float = 60) -> dict[int, Any]:
        deadline = time.monotonic() + timeout
        problems = []
        while self.waiting:
            if problems:
                deadline = min(deadline, time.monotonic() + GRACE_S)
            left = deadline - time.monotonic()
            if left <= 0:
                who = sorted(self.waiting)
                problems.append(f"ranks {who} did not finish {self.name} in time\n{self.group.dump(who)}")
                break
            problems += self._collect(min(left, GRACE_S) if problems else left)
        if problems:
            self.group.abandon()
            raise RankFailure("\n".join(problems))
        return self.results

    def _collect(self, timeout: float) -> list[str]:
        """Takes what arrives within `timeout` or the first to arrive; returns the problems among it."""
        processes = {rank: self.group.process(rank) for rank in self.waiting}
        watched = {}
        for rank, process in processes.items():
            watched[process.connection] = rank
            watched[process.sentinel] = rank
        problems = []
        ready = {watched[item] for item in multiprocessing.connection.wait(list(watched), timeout)}
        for rank in sorted(ready):
            self.waiting.discard(rank)
            try:
                kind, value = processes[rank].connection.recv()
            except (EOFError, ConnectionResetError):
                processes[rank].join(GRACE_S)
                code = processes[rank].exitcode
                problems.append(f"rank {rank} died in {self.name}, exit code {code}\n{processes[rank].printed()}")
                continue
            if kind == "error":
                problems.append(f"rank {rank} failed in {self.name}\n{value}{processes[rank].printed()}")
            else:
                self.results[rank] = value
        return problems

    def forget(self, rank: int) -> None:
        """Does not wait for this rank any more (the test killed it)."""
        self.waiting.discard(rank)


class RankGroup:
    """`ranks` processes on `device` ("cpu", or "cuda": one process a GPU) and a TCPStore on a free port."""

    def __init__(self, ranks: int, device: str = "cpu", environment: dict[str, str] | None = None):
        import torch.distributed as dist

        self.size = ranks
        self.device = device
        self.broken = False
        self.progress = _context.RawArray("q", ranks)
        self.ending = _context.RawArray("q", 2)
        self._environment = dict(environment or {})
        self._folder = tempfile.TemporaryDirectory(prefix="ep_ranks_")
        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._calls = 0
        self._starts = itertools.count()
        self._processes = {rank: self._start(rank) for rank in range(ranks)}
        self._ended: list[_RankProcess] = []  # replaced

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def process(self, rank: int) -> _RankProcess:
        return self._processes[rank]

    def start(self, function, *args, ranks=None, **kwargs) -> Pending:
        """Begins `function(Rank, *args, **kwargs)` on `ranks` (default: all)."""
        assert not self.broken, "this group had a failure; start another"
        ranks = range(self.size) if ranks is None else ranks
        self._calls += 1
        for rank in ranks:
            self._processes[rank].connection.send((self._calls, function, args, kwargs))
        return Pending(self, function.__name__, set(ranks))

    def start_parts(self, parts) -> list[Pending]:
        """Begins one call that has a function for each part: [(function, ranks, args)]. Its ranks can meet."""
        pending = []
        for function, ranks, args in parts:
            pending.append(self.start(function, *args, ranks=ranks))
            self._calls -= 1
        self._calls += 1
        return pending

    def run(self, function, *args, ranks=None, timeout: float = 60, **kwargs) -> dict[int, Any]:
        return self.start(function, *args, ranks=ranks, **kwargs).wait(timeout)

    def waited_for_cores(self, ranks) -> float:
        """Seconds that the main threads of `ranks` could have run so far and had no core, all together, by the kernel's account.

        A rank is late by its own such time, and by that of the ranks it waits for: limits on a shared machine grow by it.
        """
        waited = 0
        for rank in ranks:
            with contextlib.suppress(OSError):
                waited += int(pathlib.Path(f"/proc/{self._processes[rank].pid}/schedstat").read_text().split()[1])
        return waited / 1e9

    def signal(self, rank: int, number: int) -> float:
        """Sends a signal; returns the time (monotonic) right after."""
        os.kill(self._processes[rank].pid, number)
        return time.monotonic()

    def kill(self, rank: int) -> float:
        when = self.signal(rank, signal.SIGKILL)
        self._processes[rank].join(GRACE_S)
        return when

    def respawn(self, rank: int) -> None:
        """A new process in place of a dead one; it knows nothing of its predecessor."""
        self._processes[rank].end()
        self._processes[rank] = self._start(rank)

    def start_spare(self, rank: int, function, *args) -> _RankProcess:
        """A further process for `rank` that runs `function` and then waits to take the place of the one that dies."""
        spare = self._start(rank)
        self._calls += 1
        spare.connection.send((self._calls, function, args, {}))
        return spare

    def replace(self, rank: int, spare: _RankProcess) -> None:
        """Puts a ready spare in place of a dead process, whose end is not waited for."""
        self._ended.append(self._processes[rank])
        self._processes[rank] = spare

    def dump(self, ranks) -> str:
        """Stacks of all threads of these ranks, and what else they printed."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                self.signal(rank, signal.SIGCONT)
                self.signal(rank, signal.SIGUSR1)
        time.sleep(0.5)  # nothing tells when a stack dump is complete
        return "".join(self._processes[rank].printed() for rank in ranks)

    def abandon(self) -> None:
        self.broken = True
        for process in [*self._processes.values(), *self._ended]:
            process.end()

    def close(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(OSError):
                process.connection.send(None)
        for process in self._processes.values():
            if process.is_alive():
                process.join(GRACE_S)
            process.end()
        for process in self._ended:
            process.end()
        self._folder.cleanup()

    def _start(self, rank: int) -> _RankProcess:
        printed = pathlib.Path(self._folder.name) / f"rank{rank}.{next(self._starts)}"
        shared = self.progress, self.ending
        return _RankProcess(rank, self.device, self._server.port, shared, self._environment, printed)


class _RankProcess:
    def __init__(self, rank, device, store_port, shared, environment, printed: pathlib.Path):
        self.connection, theirs = _context.Pipe()
        self._printed = printed
        context = Rank(rank, device, store_port, *shared)
        arguments = (context, theirs, environment, list(sys.path), str(printed), os.getpid())
        self._process = _context.Process(target=_serve, args=arguments, daemon=True, name=f"rank{rank}")
        self._process.start()
        theirs.close()
        self._ready = False
        self.rank = rank
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def exitcode(self):
        return self._process.exitcode

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def is_ready(self) -> bool:
        """Of a spare: whether its function has ended. Raises with what went wrong in it."""
        if not self._ready and self.connection.poll():
            kind, value = self.connection.recv() if self.is_alive() else ("error", f"exit code {self.exitcode}\n")
            if kind == "error":
                raise RankFailure(f"spare of rank {self.rank} failed\n{value}{self.printed()}")
            self._ready = True
        return self._ready

    def join(self, timeout: float) -> None:
        self._process.join(timeout)

    def end(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.connection.close()

    def printed(self) -> str:
        """What the process printed, its last lines."""
        text = self._printed.read_text(errors="replace")[-6000:] if self._printed.exists() else ""
        return f"--- rank {self.rank} printed:\n{text}\n" if text else ""


def visible_gpu(rank: int) -> str:
    """The GPU of a rank: its own, or with NIXL_EP_TEST_SHARE_GPU=1 whatever there is in turn."""
    if os.environ.get("NIXL_EP_TEST_SHARE_GPU") == "1":
        import torch

        return str(rank % torch.cuda.device_count())
    return str(rank)


def _serve(context: Rank, connection, environment, path, printed, parent) -> None:
    """Body of a rank process: runs what the connection brings until None or its end."""
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    end_with_parent(parent)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.path[:] = path
    os.environ.update(environment)
    if context.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(context.rank)
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while (message := connection.recv()) is not None:
            context.call, function, args, kwargs = message
            try:
                answer = ("ok", function(context, *args, **kwargs))
            except BaseException:  # whatever it is, the parent shows it
                answer = ("error", traceback.format_exc())
            connection.send(answer)


def end_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when the one that started it ends; ends at once if it has."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(parent, 0)
        return
    os._exit(1)
