"""Traffic matrices: every rank process writes its row to the others at once, as engines do between steps."""

import json
import pathlib
import statistics
import time

from utils import config
from utils.benchmark_base import Failure
from utils.kv_models import load_document
from utils.memory import first_difference, pattern
from utils.ranks import Group, Rank

KINDS = {"cpu": "DRAM", "dram": "DRAM", "cuda": "VRAM", "gpu": "VRAM", "vram": "VRAM"}


class Pattern:
    """A square matrix of bytes, entry (i, j) from rank i to rank j, each cut into `shards` descriptors."""

    def __init__(self, table, folder):
        try:
            lines = (folder / table["matrix_file"]).read_text().splitlines()
            self.matrix = [[0 if word in ("0", "0K", "0M", "0G") else config.parse_size(word) for word in line.replace(",", " ").split()]
                           for line in lines if line.strip()]
        except (KeyError, OSError, ValueError) as error:
            raise Failure(f"traffic_pattern: matrix_file: {error}") from None
        self.shards, self.operation = int(table.get("shards", 1)), str(table.get("xfer_op", "WRITE")).upper()
        self.kind = KINDS.get(str(table.get("mem_type", "cpu")).lower())
        size = len(self.matrix)
        if size < 2 or any(len(row) != size for row in self.matrix):
            raise Failure(f"{table['matrix_file']}: a square matrix of at least two ranks is wanted")
        if any(self.matrix[rank][rank] for rank in range(size)):
            raise Failure(f"{table['matrix_file']}: a rank sends nothing to itself; the diagonal is 0")
        if self.kind is None or self.operation not in ("READ", "WRITE") or self.shards < 1:
            raise Failure(f"traffic_pattern: mem_type one of {', '.join(KINDS)}, xfer_op READ or WRITE, shards from 1 on")

    def sent(self, rank):
        return sum(self.matrix[rank])

    def total(self):
        return sum(map(sum, self.matrix))

    def bytes_of(self, rank):
        return self.sent(rank) + sum(row[rank] for row in self.matrix)

    def moves(self):
        """(from, to, offset there, offset here, bytes): a rank's buffer holds what it sends, then what it receives."""
        filled = [self.sent(rank) for rank in range(len(self.matrix))]
        for source, row in enumerate(self.matrix):
            at = 0
            for target, size in enumerate(row):
                if size:
                    yield source, target, at, filled[target], size
                    at += size
                    filled[target] += size


class TrafficRank(Rank):
    """Works on `options.patterns`; the word "size N" chooses number N."""

    handles = ()

    def set_size(self, number):
        self.drop()
        chosen = self.options.patterns[number]
        self.moves = [move for move in chosen.moves() if move[0] != move[1]]
        writes = chosen.operation == "WRITE"
        mine = [move for move in self.moves if move[0 if writes else 1] == self.index]
        self.waits = [move[0 if writes else 1] for move in self.moves if move[1 if writes else 0] == self.index]
        for source, target, here, there, size in mine:
            peer, near, far = (target, here, there) if writes else (source, there, here)
            self.handles.append(self.sharded(chosen, peer, near, far, size))

    def sharded(self, chosen, peer, near, far, size):
        place, step = self.places[peer], -(-size // chosen.shards)
        cuts = [(at, min(step, size - at)) for at in range(0, size, step)]
        local = self.agent.get_xfer_descs([(self.memory.address + near + at, part, self.memory.device) for at, part in cuts], self.memory.kind)
        remote = self.agent.get_xfer_descs([(place[1] + far + at, part, place[4]) for at, part in cuts], place[3])
        return self.agent.initialize_xfer(chosen.operation, local, remote, place[0], b"moved:")

    def drop(self):
        for handle in self.handles:
            self.agent.release_xfer_handle(handle)
        self.handles = []

    def step(self):
        running = [handle for handle in self.handles if self.agent.transfer(handle) != "DONE"]
        for handle in running:
            self.finish(handle)
        for peer in self.waits:
            self.expect(peer, b"moved:")
        if self.index:
            self.tell(0, b"stepped")

    def fill(self, salt):
        self.memory.write(pattern(self.memory.size, 0, 0, salt + 1000))
        for source, target, here, _, size in self.moves:
            if source == self.index:
                self.memory.write(pattern(size, source * 64 + target, 0, salt), here)

    def check(self, salt):
        for source, target, _, there, size in self.moves:
            if target == self.index:
                bad = first_difference(self.memory.read(there, size), pattern(size, source * 64 + target, 0, salt))
                if bad is not None:
                    return there + bad
        return None


class Traffic:
    """All ranks of this host; rank 0 is this process."""

    def __init__(self, patterns, options):
        num_ranks = len(patterns[0].matrix)
        if any(len(other.matrix) != num_ranks for other in patterns) or len({other.kind for other in patterns}) != 1:
            raise Failure("traffic patterns of one run have one number of ranks and one mem_type")
        options.patterns, options.initiator_mem = patterns, patterns[0].kind
        size = max(chosen.bytes_of(rank) for chosen in patterns for rank in range(num_ranks))
        self.group = Group(TrafficRank, num_ranks, options, max(size, 1))

    def everyone(self, word, call):
        self.group.tell_all(word)
        call()
        for index in range(1, self.group.num_ranks):
            self.group.own.expect(index, b"ready")

    def choose(self, number):
        self.everyone(b"do size %d" % number, lambda: self.group.own.set_size(number))

    def step(self):
        start = time.perf_counter()
        self.group.tell_all(b"do step")
        self.group.own.step()
        for index in range(1, self.group.num_ranks):
            self.group.own.expect(index, b"stepped")
        return time.perf_counter() - start

    def verify(self):
        """Moves a fresh pattern; Failure names the first rank with a wrong byte."""
        self.everyone(b"do fill 7", lambda: self.group.own.fill(7))
        self.step()
        self.group.tell_all(b"do check 7")
        seen = [self.group.own.check(7)] + [None] * (self.group.num_ranks - 1)
        for index in range(1, self.group.num_ranks):
            bad = int(self.group.own.expect(index, b"checked ").split()[1])
            seen[index] = bad if bad >= 0 else None
        for index, bad in enumerate(seen):
            if bad is not None:
                raise Failure(f"rank {index} holds a wrong byte at {bad} after the transfer")


def load(path):
    """(iterations, warm-up, patterns) of a file."""
    values, folder = load_document(path), pathlib.Path(path).resolve().parent
    tables = values.get("traffic_patterns") or [values.get("traffic_pattern")]
    if not all(isinstance(table, dict) for table in tables):
        raise Failure(f"{path}: traffic_pattern (or a list, traffic_patterns) is missing")
    return int(values.get("iters", 10)), int(values.get("warmup_iters", 2)), [Pattern(table, folder) for table in tables]


def one(path, options):
    """The report of ct-perftest."""
    iterations, warmup, patterns = load(path)
    traffic = Traffic(patterns[:1], options)
    try:
        traffic.choose(0)
        traffic.verify()
        for _ in range(warmup):
            traffic.step()
        total = sum(traffic.step() for _ in range(iterations))
        traffic.verify()
        own = traffic.group.own
        shown = own.memory.read(patterns[0].sent(0))[:64].tobytes().hex() if options.print_recv_buffers else None
    finally:
        traffic.group.close()
    if shown:
        print(f"rank 0 received, first bytes: {shown}")
    return [{"Iters": iterations, "Total time (s)": total, "Avg latency/iter (s)": total / iterations,
             "Total size (GB)": patterns[0].total() * iterations / 1e9}]


def sequential(path, options):
    """The report of sequential-ct-perftest: each pattern among the others, and alone."""
    iterations, warmup, patterns = load(path)
    traffic = Traffic(patterns, options)
    together, alone = [[] for _ in patterns], [[] for _ in patterns]
    try:
        for turn in range(warmup + iterations):
            for number in range(len(patterns)):
                traffic.choose(number)
                if turn == 0:
                    traffic.verify()
                took = traffic.step()
                if turn >= warmup:
                    together[number].append(took)
        for number in range(len(patterns)):
            traffic.choose(number)
            for turn in range(warmup + iterations):
                took = traffic.step()
                if turn >= warmup:
                    alone[number].append(took)
            if options.verify_buffers:
                traffic.verify()
    finally:
        traffic.group.close()
    rows = []
    for chosen, among, isolated in zip(patterns, together, alone):
        latency, senders = statistics.fmean(among), [sum(row) for row in chosen.matrix if sum(row)]
        rows.append({"Transfer size (GB)": chosen.total() / 1e9, "Latency (ms)": latency * 1e3,
                     "Isolated Latency (ms)": statistics.fmean(isolated) * 1e3, "Num Senders": len(senders),
                     "Mean BW (GB/s)": statistics.fmean(size / latency / 1e9 for size in senders) if senders else 0.0})
    return rows


def publish(rows, path):
    heads = list(rows[0])
    cells = [[f"{row[head]:.6g}" if isinstance(row[head], float) else str(row[head]) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    for line in [heads, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if path:
        pathlib.Path(path).write_text(json.dumps(rows, indent=1) + "\n")
