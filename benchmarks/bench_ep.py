"""./run bench ep: dispatch and combine on the CPU path beside memcpy of the same bytes, and how fast a group comes and goes.

Groups: pair (bytes a second of dispatch + combine), setup (construction, connect), faults (how long a killed rank holds the
others up). Each rank is a process of its own. The result of every operation is checked before anything is timed.
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import statistics
import sys
import time

from utils.figures import Figure, parse_arguments, report

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 4, 128, 7168, 32, 8
TIMEOUT_MS = 20_000
DETECTION_TIMEOUT_MS = 200
CALL_LIMIT_S = 120
ROW_BYTES = {"BF16": 2 * HIDDEN, "FP8": HIDDEN + 4 * (HIDDEN // 128)}
MUST = {"BF16": (0.35, 0.6), "FP8": (0.25, 0.5)}


# ---- a rank: runs what its pipe brings


@dataclasses.dataclass
class Inputs:
    x: object
    topk_idx: object
    topk_weights: object
    source: object  # what memcpy reads and writes: this rank's bytes of a pair
    target: object


class RankProcess:
    """The body of a rank. Commands are methods; times are CLOCK_MONOTONIC seconds, comparable between processes."""

    def __init__(self, rank, port, together):
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.torch, self.rank, self.together = torch, rank, together
        self.store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        self.buffer = None
        self.inputs = self._inputs()

    def _inputs(self):
        torch = self.torch
        generator = torch.Generator().manual_seed(1000 + self.rank)
        x = torch.randn((TOKENS, HIDDEN), generator=generator).to(torch.bfloat16)
        scores = torch.rand((TOKENS, RANKS * EXPERTS), generator=generator)
        topk_idx = scores.topk(TOPK, dim=1).indices.contiguous()
        weights = torch.full((TOKENS, TOPK), 1 / TOPK)
        most = TOKENS * TOPK * (ROW_BYTES["BF16"] + 2 * HIDDEN)
        return Inputs(x, topk_idx, weights, torch.ones(most, dtype=torch.uint8), torch.zeros(most, dtype=torch.uint8))

    def open(self, timeout_ms):
        """Seconds for construction with its memory."""
        import nixl_ep

        size = nixl_ep.Buffer.get_rdma_size_hint(TOKENS, HIDDEN, RANKS, RANKS * EXPERTS)
        start = time.monotonic()
        self.buffer = nixl_ep.Buffer(rank=self.rank, explicitly_destroy=True, tcp_store_group=self.store,
                                     timeout_ms=timeout_ms, device="cpu")
        self.buffer.update_memory_buffers(RANKS, EXPERTS, size)
        return time.monotonic() - start

    def connect(self):
        """Begin and end of the connect."""
        start = time.monotonic()
        self.buffer.connect_ranks(list(range(RANKS)))
        return start, time.monotonic()

    def disconnect(self, ranks):
        self.buffer.disconnect_ranks(ranks)

    def _pair(self, payload):
        x, counts, handle, _, _ = self.buffer.dispatch(self.inputs.x, self.inputs.topk_idx, TOKENS, RANKS * EXPERTS,
                                                       use_fp8=payload == "FP8")
        # The experts' answer: what arrived, in BF16. Under FP8 it is prepared once and used again, so that only ours is timed.
        if payload == "FP8":
            if self.answer is None:
                values, scales = x
                self.answer = self.torch.zeros(values.shape, dtype=self.torch.bfloat16)
                for expert, count in enumerate(counts.tolist()):
                    rows = values[expert, :count].float() * scales[expert, :count].repeat_interleave(128, 1)
                    self.answer[expert, :count] = rows.to(self.torch.bfloat16)
            x = self.answer
        return self.buffer.combine(x, self.inputs.topk_idx, self.inputs.topk_weights, handle)[0]

    def prepare(self, payload):
        """Checks one pair: weights add up to one and each expert answers with its input, so the input comes back."""
        self.answer = None
        error = (self._pair(payload).float() - self.inputs.x.float()).abs().max().item()
        limit = 0.01 if payload == "BF16" else 0.3
        if error > limit:
            raise RuntimeError(f"rank {self.rank}: {payload} result is off by {error}, at most {limit} is right")
        for _ in range(3):
            self._pair(payload)
        self._copy(payload)

    def _copy(self, payload):
        count = TOKENS * TOPK * (ROW_BYTES[payload] + 2 * HIDDEN)
        self.inputs.target[:count].copy_(self.inputs.source[:count])

    def block(self, what, payload, repetitions):
        """Begin and end of a block that all ranks begin together."""
        step = self._pair if what == "pair" else self._copy
        self.together.wait(CALL_LIMIT_S)
        start = time.monotonic()
        for _ in range(repetitions):
            step(payload)
        return start, time.monotonic()

    def phases(self, repetitions):
        """Seconds of dispatch and of combine in BF16, a pair each."""
        times = []
        for _ in range(repetitions):
            self.together.wait(CALL_LIMIT_S)
            start = time.monotonic()
            x, _, handle, _, _ = self.buffer.dispatch(self.inputs.x, self.inputs.topk_idx, TOKENS, RANKS * EXPERTS, use_fp8=False)
            middle = time.monotonic()
            self.buffer.combine(x, self.inputs.topk_idx, self.inputs.topk_weights, handle)
            times.append((middle - start, time.monotonic() - middle))
        return times

    def detect(self, victim):
        """Seconds of the dispatch that finds `victim` dead."""
        start = time.monotonic()
        self.buffer.dispatch(self.inputs.x, self.inputs.topk_idx, TOKENS, RANKS * EXPERTS, use_fp8=False)
        seconds = time.monotonic() - start
        faults = {fault.rank for fault in self.buffer.fault_status()}
        if faults != {victim}:
            raise RuntimeError(f"rank {self.rank}: faults of {sorted(faults)}, only rank {victim} was killed")
        return seconds

    def close(self):
        if self.buffer is not None:
            self.buffer.destroy()
            self.buffer = None


def serve(rank, port, together, pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        body = RankProcess(rank, port, together)
        pipe.send((True, None))
        while (command := pipe.recv()) is not None:
            pipe.send((True, getattr(body, command[0])(*command[1:])))
        body.close()
    except EOFError:
        pass
    except BaseException as error:  # the parent reports it and ends the run
        with contextlib.suppress(OSError):
            pipe.send((False, f"{type(error).__name__}: {error}"))


# ---- the parent


class Ranks:
    """The rank processes; every call is bounded."""

    def __init__(self):
        import torch.distributed as dist

        self.context = multiprocessing.get_context("spawn")
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.together = self.context.Barrier(RANKS)
        self.members = {}

    def __enter__(self):
        self.start(range(RANKS))
        return self

    def __exit__(self, *_):
        for process, pipe in self.members.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, _ in self.members.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()

    def start(self, ranks):
        for rank in ranks:
            pipe, theirs = self.context.Pipe()
            process = self.context.Process(target=serve, args=(rank, self.server.port, self.together, theirs), daemon=True)
            process.start()
            theirs.close()
            self.members[rank] = process, pipe
        self._answers(ranks, "start")

    def kill(self, rank):
        process, pipe = self.members.pop(rank)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        pipe.close()

    def call(self, *command, ranks=None):
        """Runs the command on all (or the given) ranks at once; {rank: result}."""
        ranks = list(self.members) if ranks is None else list(ranks)
        for rank in ranks:
            self.members[rank][1].send(command)
        return self._answers(ranks, command[0])

    def _answers(self, ranks, name):
        end, results = time.monotonic() + CALL_LIMIT_S, {}
        for rank in ranks:
            pipe = self.members[rank][1]
            if not pipe.poll(max(end - time.monotonic(), 0)):
                raise RuntimeError(f"rank {rank} did not finish {name} within {CALL_LIMIT_S} s")
            good, value = pipe.recv()
            if not good:
                raise RuntimeError(f"rank {rank} failed in {name}: {value}")
            results[rank] = value
        return results


def span(times):
    """From the first begin to the last end."""
    return max(end for _, end in times.values()) - min(start for start, _ in times.values())


def measure_pairs(ranks, rounds, repetitions):
    figures = []
    for payload in ("BF16", "FP8"):
        ranks.call("prepare", payload)
        rounds_of = {"pair": [], "copy": []}
        for _ in range(rounds):
            for what, spans in rounds_of.items():
                spans.append(span(ranks.call("block", what, payload, repetitions)) / repetitions)
        total = RANKS * TOKENS * TOPK * (ROW_BYTES[payload] + 2 * HIDDEN)
        share = statistics.median(copy / pair for pair, copy in zip(rounds_of["pair"], rounds_of["copy"]))
        pair, copy = (statistics.median(rounds_of[what]) for what in ("pair", "copy"))
        must, goal = MUST[payload]
        figures.append(Figure(f"pair, {payload} dispatch", share, "of memcpy", must, goal, higher_is_better=True,
                              note=f"{total / pair / 1e9:.2f} GB/s, memcpy {total / copy / 1e9:.2f} GB/s; "
                                   f"{total / 1e6:.0f} MB in {1e3 * pair:.1f} ms"))
    phases = ranks.call("phases", rounds * repetitions)
    for index, name in enumerate(("dispatch", "combine")):
        medians = [statistics.median(pair[index] for pair in times) for times in phases.values()]
        figures.append(Figure(f"{name}, BF16, worst rank's median", 1e3 * max(medians), "ms"))
    return figures


def measure_setup(ranks, rounds):
    construction, connect = [], []
    for _ in range(rounds):
        construction.append(max(ranks.call("open", TIMEOUT_MS).values()))
        connect.append(span(ranks.call("connect")))
        ranks.call("close")
    return [
        Figure("construction with memory, worst rank", statistics.median(construction), "s", 0.4, 0.15),
        Figure("connect, from the first call to the last return", statistics.median(connect), "s", 0.4, 0.1),
    ]


def measure_detection(ranks, kills):
    victim, late = RANKS - 1, []
    ranks.call("open", DETECTION_TIMEOUT_MS)
    ranks.call("connect")
    for _ in range(kills):
        ranks.kill(victim)
        survivors = sorted(ranks.members)
        late.append(max(ranks.call("detect", victim, ranks=survivors).values()) - DETECTION_TIMEOUT_MS / 1e3)
        ranks.call("disconnect", [victim], ranks=survivors)
        ranks.start([victim])
        ranks.call("open", DETECTION_TIMEOUT_MS, ranks=[victim])
        ranks.call("connect")
    ranks.call("close")
    return [Figure("dispatch that finds a killed rank, beyond the timeout", 1e3 * statistics.median(late), "ms", 50, 20,
                   note=f"{kills} kills at timeout_ms={DETECTION_TIMEOUT_MS}, worst {1e3 * max(late):.1f} ms")]


def flags(parser: argparse.ArgumentParser):
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each kind, taken in turn")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs or copies in a block")
    parser.add_argument("--kills", type=int, default=5)


def main():
    arguments = parse_arguments(__doc__, flags)
    figures = []
    with Ranks() as ranks:
        if arguments.only in "setup":
            figures += measure_setup(ranks, 5)
        if arguments.only in "pair":
            ranks.call("open", TIMEOUT_MS)
            ranks.call("connect")
            figures += measure_pairs(ranks, arguments.rounds, arguments.repetitions)
            ranks.call("close")
        if arguments.only in "faults":
            figures += measure_detection(ranks, arguments.kills)
    method = (f"{RANKS} processes on {os.cpu_count()} CPUs, {TOKENS} tokens a rank, hidden {HIDDEN}, {EXPERTS} experts a rank, "
              f"top-k {TOPK}, CPU path. pair: valid (token, expert) rows x row bytes, dispatch and combine; blocks of "
              f"{arguments.repetitions} pairs and of memcpy of the same bytes by as many processes in turn, from the first begin "
              f"to the last end; median of the ratios of {arguments.rounds} rounds.")
    return report("expert parallel on the CPU path", figures, method, arguments)


if __name__ == "__main__":
    sys.exit(main())
