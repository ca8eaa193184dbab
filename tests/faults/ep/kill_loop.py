#!/usr/bin/env python3
"""Kills ranks at random points, again and again: replacements wait ready, with their device's context, buffer and graph made.

    python tests/faults/ep/kill_loop.py --device cuda --seconds 150 --state build/kills.json

Four ranks serve rounds without a pause (tests/support/ep_rounds.py), every value judged on the device. A random rank gets a
SIGKILL, sometimes a SIGTERM or a SIGSTOP, at a random point, mostly inside a kernel. Every survivor must name exactly that rank,
be held up by it for no longer than the timeout and a few milliseconds, and compute the right rest; then a replacement joins, or
the woken rank is unmasked, and everybody must be whole again. With --state a later call goes on counting where this one ended.
Prints what happened as one line of JSON; exit code 0: every fault was survived.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "python")]

from ep_cases import Shape  # noqa: E402
from ep_faults import replace_peer, unmask_everyone  # noqa: E402
from ep_ranks import RankFailure, RankGroup  # noqa: E402
from ep_rounds import close_rounds, join, prepare, serve_rounds, write_tables  # noqa: E402

RANKS = 4
KINDS = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
SPARE_LIMIT_S = 60.0  # until a replacement is ready
TOLD_SLACK_MS = 1000.0  # from the signal to the survivors' knowing, beyond the timeout: processes die in their own time


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--seconds", type=float, default=150, help="no fault begins after this time")
    add("--kills", type=int, default=200, help="stop when so many were tried, earlier calls included")
    add("--state", help="file that keeps the count over several calls")
    add("--timeout-ms", type=int, default=200)
    add("--slack-ms", type=float, help="how much longer than the timeout a survivor may be held up (cuda 5, cpu 1000)")
    add("--combine", choices=("exact", "reduced"), default="reduced")
    add("--tokens", type=int, default=48, help="tokens a rank")
    add("--hidden", type=int, default=1024)
    add("--pairs", type=int, default=6, help="dispatches and combines in a round")
    add("--spares", type=int, default=4, help="replacements a rank that are kept ready")
    add("--mix", default="75,15,10", help="shares of SIGKILL, SIGTERM and SIGSTOP")
    add("--seed", type=int, default=int(os.environ.get("NIXL_EP_FAULT_SEED", "1")))
    options = parser.parse_args(arguments)
    if options.slack_ms is None:
        options.slack_ms = 5.0 if options.device == "cuda" else 1000.0
    return options


def shape_of(options) -> Shape:
    return Shape(ranks=RANKS, experts_per_rank=4, max_tokens=options.tokens, hidden=options.hidden, topk=4)


class Tally:
    """Counts over several calls."""

    def __init__(self, path: str | None):
        self.path = pathlib.Path(path) if path else None
        self.values = {"tried": 0, "survived": 0, "signals": {}, "stalled_ms": [], "told_ms": [], "problems": []}
        if self.path and self.path.exists():
            self.values = json.loads(self.path.read_text())

    def begin(self, kind: str) -> None:
        self.values["tried"] += 1
        self.values["signals"][kind] = self.values["signals"].get(kind, 0) + 1

    def end(self, stretches, when: float) -> None:
        values = self.values
        values["survived"] += 1
        values["told_ms"].append(round(max(1000 * (seen.told_at - when) for seen in stretches), 2))
        values["stalled_ms"].append(round(max(seen.stalled_ms for seen in stretches), 2))
        self.keep()

    def spoil(self, problem: str) -> None:
        self.values["problems"].append(problem)
        self.keep()

    def keep(self) -> None:
        if self.path:
            self.path.write_text(json.dumps(self.values))

    def summary(self) -> dict:
        def worst(times):
            times = sorted(times) or [0.0]
            return {"median": times[len(times) // 2], "p99": times[int(0.99 * (len(times) - 1))], "worst": times[-1]}

        values = self.values
        return values | {"stalled_ms": worst(values["stalled_ms"]), "told_ms": worst(values["told_ms"]), "problems": values["problems"][:5]}


class KillLoop:
    def __init__(self, options, tally: Tally, folder: str):
        self.options, self.tally = options, tally
        self.points = random.Random(options.seed + 1000 * tally.values["tried"])
        self.arguments = shape_of(options), folder, options.pairs, options.timeout_ms, options.combine, "kill loop"
        environment = {"NIXL_EP_LINE_BYTES": "16"} if os.environ.get("NIXL_EP_TEST_SHARE_GPU") == "1" else {}
        self.ranks = list(range(RANKS))
        self.group = RankGroup(RANKS, options.device, environment)
        self.spares = {rank: [] for rank in self.ranks}
        self.waiting_s = 0.0
        self.victim = -1

    def open(self) -> None:
        self.refill()
        self.group.run(prepare, *self.arguments, timeout=120)
        self.group.run(join, self.ranks)
        self.check_whole()

    def refill(self) -> None:
        for rank, spares in self.spares.items():
            while len(spares) < self.options.spares:
                spares.append(self.group.start_spare(rank, prepare, *self.arguments))

    def choose_victim(self) -> int:
        """A rank whose replacement is ready."""
        began = time.monotonic()
        while time.monotonic() < began + SPARE_LIMIT_S:
            ready = [rank for rank in self.ranks if any(spare.is_ready() for spare in self.spares[rank])]
            if ready:
                self.waiting_s += time.monotonic() - began
                return self.points.choice(ready)
            time.sleep(0.002)
        raise RankFailure("no replacement became ready\n" + "".join(self.spares[rank][0].printed() for rank in self.ranks))

    def take_spare(self, rank: int) -> None:
        ready = next(spare for spare in self.spares[rank] if spare.is_ready())
        self.spares[rank].remove(ready)
        self.group.replace(rank, ready)

    def check_whole(self, rounds: int = 2) -> None:
        for rank, seen in self.group.run(serve_rounds, 0, rounds).items():
            if seen.masked_before or seen.named or seen.wrong:
                raise RankFailure(f"afterwards rank {rank} is not whole: {seen}")

    def fault(self, kind: int) -> None:
        """One fault and the recovery from it."""
        self.tally.begin(signal.Signals(kind).name)
        group, victim = self.group, self.choose_victim()
        self.victim = victim
        alive = [rank for rank in self.ranks if rank != victim]
        for rank in self.ranks:
            group.progress[rank] = 0
        group.ending[0] = group.ending[1] = 0
        self.without_core = group.waited_for_cores(alive)
        survivors = group.start(serve_rounds, alive[0], ranks=alive)
        doomed = group.start(serve_rounds, alive[0], ranks=[victim])
        self.wait_for(victim, self.points.randint(1, 3))
        time.sleep(self.points.random() * 0.01)  # the random part of the point
        when = group.signal(victim, kind)
        reached = group.progress[victim]
        for rank in alive:
            self.wait_for(rank, reached + 3)
        if kind == signal.SIGSTOP:
            group.signal(victim, signal.SIGCONT)
        else:
            doomed.forget(victim)
        group.ending[0] = 1
        seen, woken = survivors.wait(30), doomed.wait(30)
        problems = self.judge(victim, seen, woken, when)
        if problems:
            raise RankFailure("\n".join(problems))
        if kind == signal.SIGSTOP:
            group.run(unmask_everyone, f"{self.tally.values['tried']}", self.ranks)
        else:
            self.take_spare(victim)
            joining = group.start(join, self.ranks, ranks=[victim])
            group.run(replace_peer, [victim], ranks=alive)
            joining.wait()
        self.check_whole()
        self.tally.end(seen.values(), when)

    def wait_for(self, rank: int, reached: int) -> None:
        deadline = time.monotonic() + 30
        while self.group.progress[rank] < reached:
            if time.monotonic() > deadline or not self.group.process(rank).is_alive():
                raise RankFailure(f"rank {rank} stays at round {self.group.progress[rank]}\n{self.group.dump([rank])}")
            time.sleep(0.0002)

    def judge(self, victim: int, survivors: dict, woken: dict, when: float) -> list[str]:
        options, problems = self.options, []
        # On the CPU path a rank needs a core to be in time; on GPUs the device's clock counts.
        late_ms = 1000 * (self.group.waited_for_cores(survivors) - self.without_core) if options.device == "cpu" else 0.0
        for rank, seen in (survivors | woken).items():
            expected = {victim} if rank in survivors else set(survivors)
            if seen.masked_before or seen.named != expected or seen.wrong:
                problems.append(f"victim {victim}, rank {rank}: {seen}")
        for rank, seen in survivors.items():
            told_ms = 1000 * (seen.told_at - when) if seen.told_at is not None else float("inf")
            if seen.stalled_ms > options.timeout_ms + options.slack_ms + late_ms:
                problems.append(f"rank {rank} was held up {seen.stalled_ms:.1f} ms by rank {victim}")
            if told_ms > options.timeout_ms + TOLD_SLACK_MS + late_ms:
                problems.append(f"rank {rank} was told {told_ms:.1f} ms after the signal to rank {victim}")
        return problems

    def run(self) -> None:
        end = time.monotonic() + self.options.seconds
        shares = [float(share) for share in self.options.mix.split(",")]
        try:
            self.open()
            while time.monotonic() < end and self.tally.values["tried"] < self.options.kills:
                kind = self.points.choices(KINDS, shares)[0]
                try:
                    self.fault(kind)
                except RankFailure as failure:
                    self.tally.spoil(f"{signal.Signals(kind).name} of rank {self.victim}: {failure}")
                    raise
                self.refill()
            self.group.run(close_rounds)
        finally:
            for spare in (spare for spares in self.spares.values() for spare in spares):
                spare.end()
            self.group.close()


def main(arguments=None) -> int:
    options = parse(arguments)
    tally = Tally(options.state)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ep_kills_") as folder:
        write_tables(folder, shape_of(options), options.combine)
        loop = KillLoop(options, tally, folder)
        try:
            loop.run()
        except RankFailure as failure:
            print(f"FAILED: {failure}", file=sys.stderr, flush=True)
    call = {"device": options.device, "timeout_ms": options.timeout_ms, "seconds": round(time.monotonic() - began, 1)}
    summary = call | {"waited_for_replacements_s": round(loop.waiting_s, 1)} | tally.summary()
    print(json.dumps(summary), flush=True)
    return 0 if summary["tried"] == summary["survived"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
