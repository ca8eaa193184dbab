#!/usr/bin/env python3
"""Runs a plan of joining, leaving and dying ranks over nixl_ep, and checks every phase. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from plan import Plan
from rank_server import RankServer, get_rank, release_rank

KILL_AFTER_S = 0.0001
ACCEPTED_EXITS = (0, -signal.SIGTERM)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; 1 or more is needed")
    return number


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--plan", default="plan.json", help="the phases (README.md); those shipped lie beside this file")
    add("--num-processes", type=positive, default=8, help="rank processes that this launcher starts")
    add("--num-tokens", type=positive, default=128, help="tokens a rank dispatches")
    add("--num-experts-per-rank", type=positive, default=2)
    add("--hidden-dim", type=positive, default=7168)
    add("--num-topk", type=positive, default=8)
    add("--tcp-server", metavar="ADDRESS", help="join the servers of a launcher on this host instead of starting them")
    add("--kineto", action="store_true", help="measure kernel time with the profiler (CUDA)")
    add("--disable-ll-nvlink", action="store_true", help="do not use NVLink")
    add("--timeout-ms", type=int, default=30_000, help="limit of every wait for a peer")
    add("--validate-phase-failures", action="store_true", help="the ranks found dead must be those the plan kills")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is a GPU, else cpu")
    add("--report", metavar="FILE", help="write one JSON line a phase and rank")
    add("--store-port", type=int, default=9999, help="port of the TCPStore; 0: any free one")
    add("--rank-server-port", type=int, default=10_000, help="port of the rank server; 0: any free one")
    add("--runs", type=positive, default=50, help="warm-up and timed operations a phase")
    add("--limit-seconds", type=float, default=1800, help="everything is stopped after this time")
    return parser.parse_args(arguments)


def choose_device(wanted: str) -> tuple[str, str]:
    """(device, why)."""
    if wanted != "auto":
        return wanted, "as asked for with --device"
    import torch

    gpus = torch.cuda.device_count()
    return ("cuda", f"{gpus} CUDA devices are visible") if gpus else ("cpu", "no CUDA device is visible")


# --------------------------------------------------------------------------------------------------------------- worker


class Worker:
    """One rank process, from its first phase to its last."""

    def __init__(self, options, address: str, device: str, report):
        self.options, self.address, self.device, self.report = options, address, device, report
        self.plan = Plan.load(options.plan)
        self.local, self.rank, context = get_rank(address, options.rank_server_port)
        self.start = self.plan.starts_at(self.rank, context or 0)
        self.phase = self.start
        self.buffer = None
        self.connected: set[int] = set()

    def run(self) -> None:
        self.report({"rank": self.rank, "start": self.start})
        if self.start is None:
            return
        self._open()
        signal.signal(signal.SIGTERM, self._terminated)
        for self.phase in range(self.start, len(self.plan)):
            if self.rank in self.plan.removed(self.phase):
                break
            self._phase()
        else:
            self.phase = len(self.plan)
        self._leave()

    def _open(self) -> None:
        if self.device == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = str(self.local % 8)
        import nixl_ep
        import torch
        from store_group import client_store

        torch.set_num_threads(1)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device(self.device)
        if self.device == "cuda":
            torch.cuda.set_device(0)
        options, capacity = self.options, self.plan.max_num_ranks
        self.max_tokens = (options.num_tokens + 3) // 4 * 4
        experts = options.num_experts_per_rank
        size = nixl_ep.Buffer.get_rdma_size_hint(self.max_tokens, options.hidden_dim, capacity, experts * capacity)
        self.buffer = nixl_ep.Buffer(
            rank=self.rank,
            disable_ll_nvlink=options.disable_ll_nvlink,
            explicitly_destroy=True,
            tcp_store_group=client_store(self.address, options.store_port),
            timeout_ms=options.timeout_ms,
            device=self.device,
        )
        self.buffer.update_memory_buffers(capacity, experts, size)

    def _terminated(self, number, _frame) -> None:
        """Killed by the plan or from outside: the id is free again from this phase on."""
        release_rank(self.address, self.options.rank_server_port, self.rank, self.phase)
        self.buffer.destroy()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _leave(self) -> None:
        self.buffer.destroy()
        if self.phase < len(self.plan):  # after the last phase nobody asks for ids, and the servers may be gone
            release_rank(self.address, self.options.rank_server_port, self.rank, self.phase)

    def _phase(self) -> None:
        from checks import Checked, Setting, kernel_times, measure

        plan, phase, options = self.plan, self.phase, self.options
        began = time.monotonic()
        new = plan.new(phase, self.rank, self.start)
        if new:
            self.buffer.connect_ranks(new)
            self.connected |= set(new)
        removed = [rank for rank in plan.removed(phase) if rank in self.connected]
        if removed:
            self.buffer.disconnect_ranks(removed)
            self.connected -= set(removed)
        changed_s = time.monotonic() - began
        num_ranks = max(plan.present(phase)) + 1
        setting = Setting(
            rank=self.rank,
            num_ranks=num_ranks,
            num_experts=options.num_experts_per_rank * num_ranks,
            num_tokens=options.num_tokens,
            max_tokens=self.max_tokens,
            hidden=options.hidden_dim,
            topk=options.num_topk,
            device=self.device,
            seed=phase,
        )
        checked = Checked(self.buffer, setting, plan.max_num_ranks)
        doomed = self.rank in plan.killed(phase)
        done = checked.run(self._kill_soon if doomed else None)
        faults = [
            {"rank": fault.rank, "phase": str(fault.phase), "operation": fault.operation}
            for fault in self.buffer.fault_status()
        ]
        measured = measure(self.buffer, setting, options.runs, options.runs).summary()
        if options.kineto:
            measured |= kernel_times(self.buffer, setting)
        masked = checked.masked()
        failed = sorted(rank for rank in self.connected if rank < num_ranks and masked[rank])
        expected = sorted(self.connected & set(plan.killed(phase)))
        if options.validate_phase_failures and failed != expected:
            raise AssertionError(f"rank {self.rank}, phase {phase}: ranks {failed} failed, the plan kills {expected}")
        if failed:
            self.buffer.disconnect_ranks(failed)
            self.connected -= set(failed)
        self.report(
            {
                "phase": phase,
                "rank": self.rank,
                "ranks": plan.present(phase),
                "device": self.device,
                "checked": done,
                "change_ms": round(1000 * changed_s, 1),
                "failed": failed,
                "faults": faults,
                **measured,
            }
        )

    def _kill_soon(self) -> None:
        threading.Timer(KILL_AFTER_S, os.kill, (os.getpid(), signal.SIGTERM)).start()


def work(options, address: str, device: str, launcher) -> None:
    """Body of a rank process. The connection to the launcher takes the reports; this process ends when it does."""
    threading.Thread(target=lambda: (launcher.poll(None), os._exit(1)), daemon=True).start()
    try:
        Worker(options, address, device, launcher.send).run()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


# ------------------------------------------------------------------------------------------------------------- launcher


class Launcher:
    """Starts the processes, starts others for ids that the plan takes back, and collects what ranks report."""

    def __init__(self, options, device: str):
        self.options, self.device = options, device
        self.plan = Plan.load(options.plan)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])
        self.running: dict = {}  # process: our end of its connection
        self.began: dict = {}  # process: its rank and first phase
        self.phases: dict[int, list] = defaultdict(list)
        self.problems: list[str] = []
        self.servers = []
        self.file = open(options.report, "w") if options.report else None

    def run(self) -> int:
        address = self._serve()
        for _ in range(self.options.num_processes):
            self._start(address)
        deadline = time.monotonic() + self.options.limit_seconds
        while self.running:
            waiting = [process.sentinel for process in self.running] + list(self.running.values())
            multiprocessing.connection.wait(waiting, timeout=1)
            for process in list(self.running):
                alive = process.is_alive()  # asked first: what it sent before its end is then all there
                self._collect(process)
                if not alive:
                    self._ended(process, address)
            if self.problems or time.monotonic() > deadline:
                if not self.problems:
                    self.problems.append(f"not finished after --limit-seconds {self.options.limit_seconds:g}")
                break
        for process in self.running:
            process.kill()
            process.join()
        self._finish()
        return 1 if self.problems else 0

    def _serve(self) -> str:
        options = self.options
        if options.tcp_server:
            return options.tcp_server
        from store_group import master_store

        store, ranks = master_store(options.store_port), RankServer(options.rank_server_port)
        options.store_port, options.rank_server_port = store.port, ranks.port
        self.servers = [store, ranks]
        print(f"TCPStore on port {store.port}, rank server on port {ranks.port}", flush=True)
        return "127.0.0.1"

    def _start(self, address: str) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(self.options, address, self.device, theirs))
        process.start()
        theirs.close()
        self.running[process] = ours

    def _ended(self, process, address: str) -> None:
        """A process is gone; if the plan takes its id back later, another one starts for it."""
        process.join()
        self.running.pop(process).close()
        told = self.began.pop(process, None)
        if process.exitcode not in ACCEPTED_EXITS:
            who = f"rank {told['rank']}" if told else f"process {process.pid}"
            self.problems.append(f"{who} ended with exit code {process.exitcode}")
        elif told is not None and told["start"] is not None:
            left = self._left_at(told)
            for phase in range(told["start"], len(self.plan) if left is None else left):
                if not any(report["rank"] == told["rank"] for report in self.phases[phase]):
                    self.problems.append(f"rank {told['rank']} ended without a report of phase {phase}")
            if left is not None and self.plan.starts_at(told["rank"], left) is not None:
                self._start(address)

    def _left_at(self, told: dict) -> int | None:
        """The phase in which the plan ends a process that began at told["start"]; None: with the plan."""
        for phase in range(told["start"], len(self.plan)):
            if told["rank"] in self.plan.killed(phase) or told["rank"] in self.plan.removed(phase):
                return phase
        return None

    def _collect(self, process) -> None:
        connection = self.running[process]
        try:
            while connection.poll():
                report = connection.recv()
                if "start" in report:
                    self.began[process] = report
                    continue
                self.phases[report["phase"]].append(report)
                if self.file:
                    self.file.write(json.dumps(report) + "\n")
                    self.file.flush()
        except (EOFError, ConnectionResetError):
            pass  # its exit code says the rest

    def _finish(self) -> None:
        if self.file:
            self.file.close()
        for server in self.servers:
            if isinstance(server, RankServer):
                server.close()
        print_table(self.plan, self.phases)
        for problem in self.problems:
            print(f"FAILED: {problem}", flush=True)
        if not self.problems:
            print("the plan ran to its end, every check held", flush=True)


def print_table(plan: Plan, phases: dict[int, list]) -> None:
    """Means over ranks of their medians; GB/s are bytes of valid rows that a rank sends over that time."""
    heads = f"{'phase':>5}  {'ranks':<26}{'reports':>8}{'change ms':>11}"
    print(f"\n{heads}{'dispatch us':>13}{'GB/s':>8}{'combine us':>12}{'GB/s':>8}  failed")
    for number in range(len(plan)):
        reports = phases.get(number)
        if not reports:
            continue

        def mean(key, reports=reports):
            return sum(report[key] for report in reports) / len(reports)

        failed = sorted({rank for report in reports for rank in report["failed"]})
        names = ",".join(str(rank) for rank in plan.phases[number])
        print(
            f"{number:>5}  {names:<26}{len(reports):>8}{mean('change_ms'):>11.1f}{mean('dispatch_us_median'):>13.1f}"
            f"{mean('dispatch_gb_per_s'):>8.2f}{mean('combine_us_median'):>12.1f}{mean('combine_gb_per_s'):>8.2f}"
            f"  {failed or '-'}",
            flush=True,
        )


def find_plan(path: str) -> str:
    """The file as given, else the one of that name beside this file."""
    here = pathlib.Path(__file__).resolve().parent
    for candidate in (pathlib.Path(path), here / path):
        if candidate.is_file():
            return str(candidate)
    names = ", ".join(sorted(file.name for file in here.glob("*.json")))
    raise SystemExit(f"elastic.py: there is no plan {path}; beside elastic.py lie {names}")


def main(arguments=None) -> int:
    options = parse(arguments)
    options.plan = find_plan(options.plan)
    device, why = choose_device(options.device)
    if options.kineto and device != "cuda":
        raise SystemExit("elastic.py: --kineto measures GPU kernels; it needs --device cuda")
    print(f"{socket.gethostname()}: {options.num_processes} processes on {device} ({why}), plan {options.plan}", flush=True)
    return Launcher(options, device).run()


if __name__ == "__main__":
    sys.exit(main())
