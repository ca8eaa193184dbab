#!/usr/bin/env python3
"""A group of ranks grows, loses one to SIGKILL, shrinks, and takes the lost one back; every token is checked.

    ./run demo [--seconds 4] [--ranks 6] [--device auto|cpu|cuda] [--picture demo.png]

Every rank is a process that dispatches its tokens to the experts of all ranks and combines what they return, without
a pause. This program says who comes and goes, and kills. Exit code 0 only if the plan finished and no token was wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "tests" / "python")]

import demo_rank
import demo_view

TIMEOUT_MS = 500  # limit of every wait for a peer: what a dead rank costs, once
CALL_LIMIT_S = 30  # no step of the plan may take longer
AHEAD = 64  # operations granted beyond the slowest rank


@dataclass
class Phase:
    """What happens at its start (joins, leaves), and who dies in its middle; `title` says it to people."""

    title: str
    present: list
    joins: list = field(default_factory=list)
    leaves: list = field(default_factory=list)
    killed: int | None = None
    # Filled in as it runs:
    began: float = 0.0
    ended: float = 0.0
    change_ms: float = 0.0
    killed_at: float | None = None
    records: dict = field(default_factory=dict)  # rank: demo_rank.Record

    def alive(self) -> list:
        return [rank for rank in self.present if rank != self.killed]

    def detection_ms(self) -> float | None:
        """From the kill until the last survivor's operation had returned and named the dead rank."""
        told = [record.told_at for record in self.records.values() if record.told_at]
        return 1000 * (max(told) - self.killed_at) if told and self.killed_at else None


def make_plan(ranks: int) -> list[Phase]:
    everyone, victim, leaver = list(range(ranks)), (ranks - 2) // 2, ranks - 1
    first, late = everyone[:-2], everyone[-2:]
    survivors = [rank for rank in everyone if rank != victim]
    fewer = [rank for rank in survivors if rank != leaver]
    again = sorted([*fewer, victim])
    return [
        Phase(f"{len(first)} ranks", first, joins=first),
        Phase(f"ranks {late[0]} and {late[1]} join", everyone, joins=late),
        Phase(f"rank {victim} is killed", everyone, killed=victim),
        Phase(f"rank {leaver} leaves", fewer, leaves=[leaver]),
        Phase(f"rank {victim} returns", again, joins=[victim]),
    ]


class Demo:
    """Starts and ends the rank processes and walks them through the plan."""

    def __init__(self, options, device: str, why: str):
        self.options, self.device, self.why = options, device, why
        self.plan = make_plan(options.ranks)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
        self.board = demo_rank.Board(self.context, options.ranks)
        self.ranks = {}  # rank: (process, connection)
        self.problems: list[str] = []
        self.events: list[tuple] = []  # (time, rank, "join" | "kill" | "leave" | "return")
        self.view = demo_view.LiveView(self)

    # ------------------------------------------------------------------------------------------------- processes

    def start(self, rank: int) -> None:
        ours, theirs = self.context.Pipe()
        settings = demo_rank.Settings(
            rank, self.options.ranks, self.device, self.store.port, TIMEOUT_MS, self.options.tokens, self.options.hidden
        )
        process = self.context.Process(target=demo_rank.main, args=(settings, self.board, theirs), daemon=True)
        process.start()
        theirs.close()
        self.ranks[rank] = process, ours

    def ask(self, ranks, method: str, *arguments) -> None:
        for rank in ranks:
            self.ranks[rank][1].send((method, arguments))

    def answers(self, ranks, limit: float = CALL_LIMIT_S) -> dict:
        """Their answers; raises RuntimeError naming a rank that failed, died or is late."""
        deadline, results = time.monotonic() + limit, {}
        for rank in ranks:
            connection = self.ranks[rank][1]
            while not connection.poll(0.1):
                self.view.refresh()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"rank {rank} did not answer within {limit:g} s")
            try:
                results[rank], error = connection.recv()
            except (EOFError, ConnectionResetError):
                self.ranks[rank][0].join(1)
                raise RuntimeError(f"rank {rank} died, exit code {self.ranks[rank][0].exitcode}") from None
            if error:
                raise RuntimeError(f"rank {rank} failed:\n{error}")
        return results

    def call(self, ranks, method: str, *arguments) -> dict:
        self.ask(ranks, method, *arguments)
        return self.answers(ranks)

    def end_all(self) -> None:
        for process, _ in self.ranks.values():
            process.kill()
            process.join()

    # ------------------------------------------------------------------------------------------------------ plan

    def run(self) -> int:
        import torch.distributed as dist

        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.began = time.monotonic()
        try:
            for number, phase in enumerate(self.plan):
                self.change(number, phase)
                self.serve(number, phase)
                if self.problems:
                    break
            else:
                self.call(self.plan[-1].alive(), "close")
        except RuntimeError as error:
            self.problems.append(str(error))
        finally:
            self.end_all()
        self.view.close()
        return self.report()

    def change(self, number: int, phase: Phase) -> None:
        """Members come and go. Those who stay disconnect and connect; newcomers start and connect to all."""
        self.view.enter(number, phase)
        began = time.monotonic()
        before = self.plan[number - 1].alive() if number else []
        staying = [rank for rank in before if rank in phase.present]
        if phase.leaves:
            self.call(phase.leaves, "close")
            self.call(staying, "disconnect", phase.leaves)
            self.mark(phase.leaves, "leave")
        if number and self.plan[number - 1].killed is not None:
            self.call(staying, "disconnect", [self.plan[number - 1].killed])
        for rank in phase.joins:
            self.start(rank)
        self.ask(phase.joins, "open", phase.present)
        if phase.joins and staying:
            self.ask(staying, "connect", phase.joins)
        self.answers(phase.joins + (staying if phase.joins else []))
        self.mark(phase.joins, "return" if number and number == len(self.plan) - 1 else "join")
        phase.change_ms = 1000 * (time.monotonic() - began)
        self.call(phase.present, "prepare", number, phase.present, phase.killed)

    def serve(self, number: int, phase: Phase) -> None:
        """Grants operations until the phase's time is over; kills the victim in the middle."""
        self.board.reset()
        phase.began = time.monotonic()
        self.ask(phase.present, "serve", number)
        kill_at = phase.began + 0.45 * self.options.seconds if phase.killed is not None else None
        while time.monotonic() < phase.began + self.options.seconds:
            living = phase.present if phase.killed_at is None else phase.alive()
            self.board.grant(min(self.board.done(rank) for rank in living) + AHEAD)
            if kill_at and time.monotonic() > kill_at:
                os.kill(self.ranks[phase.killed][0].pid, signal.SIGKILL)
                phase.killed_at, kill_at = time.monotonic(), None
                self.mark([phase.killed], "kill")
            for rank in living:
                if not self.ranks[rank][0].is_alive() and rank != phase.killed:
                    raise RuntimeError(f"rank {rank} died, exit code {self.ranks[rank][0].exitcode}")
            self.view.refresh()
            time.sleep(0.02)
        self.board.end_phase()
        phase.records = self.answers(phase.alive())
        phase.ended = time.monotonic()
        self.check(phase)

    def check(self, phase: Phase) -> None:
        for rank, record in phase.records.items():
            if record.wrong:
                self.problems.append(f"{phase.title}: rank {rank} got {record.wrong} wrong tokens, first: {record.first_wrong}")
            wanted = {phase.killed} - {None}
            if record.named != wanted:
                self.problems.append(f"{phase.title}: rank {rank} missed ranks {record.named or '{}'}, not {wanted or '{}'}")

    def mark(self, ranks, what: str) -> None:
        self.events += [(time.monotonic(), rank, what) for rank in ranks]

    # ---------------------------------------------------------------------------------------------------- report

    def report(self) -> int:
        print(demo_view.table(self), flush=True)
        if not self.problems:
            demo_view.picture(self, self.options.picture)
            print(f"\npicture: {self.options.picture}")
        for problem in self.problems:
            print(f"FAILED: {problem}")
        return 1 if self.problems else 0

    def latencies(self, phase: Phase, name: str) -> tuple[float, float]:
        """(median, p99) in milliseconds over all operations of all ranks."""
        seconds = sorted(value for record in phase.records.values() for value in getattr(record, name))
        if not seconds:
            return float("nan"), float("nan")
        return 1000 * statistics.median(seconds), 1000 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]


def choose_device(wanted: str, ranks: int) -> tuple[str, str]:
    if wanted != "auto":
        return wanted, "asked for with --device"
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= ranks:
        return "cuda", f"{gpus} GPUs are visible, {ranks} ranks need one each"
    return "cpu", f"{gpus} GPUs are visible, {ranks} ranks need one each" if gpus else "no CUDA device is visible"


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=6, help="most ranks at one time (4 to 16)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each of the five phases")
    parser.add_argument("--tokens", type=int, default=32, help="tokens a rank and operation")
    parser.add_argument("--hidden", type=int, default=1024, help="channels of a token")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--picture", default="demo.png", help="where the timeline goes")
    options = parser.parse_args()
    if not 4 <= options.ranks <= 16:
        parser.error(f"--ranks {options.ranks}: 4 to 16")
    if options.seconds <= 0 or options.tokens <= 0 or options.hidden <= 0 or options.hidden % 8:
        parser.error("--seconds, --tokens and --hidden must be positive, --hidden a multiple of 8")
    device, why = choose_device(options.device, options.ranks)
    return Demo(options, device, why).run()


if __name__ == "__main__":
    sys.exit(main())
