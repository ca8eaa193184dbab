#!/usr/bin/env python3
"""All-reduce built from WRITE and notifications, by a ring or a tree of rank processes; the result is compared with the sum.

Bandwidth in the table counts the buffer once; the line `Bus bandwidth` multiplies by 2(n-1)/n as collectives are compared."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy  # noqa: E402

from utils.benchmark_base import Usage, run  # noqa: E402
from utils.config import format_size  # noqa: E402
from utils.memory import first_difference  # noqa: E402
from utils.ranks import GroupBenchmark, GroupLane, Rank  # noqa: E402


def as_float32(raw, dtype):
    """Values of raw bytes; bf16 is the upper half of an f32."""
    if dtype == "f32":
        return raw.view(numpy.float32)
    return (raw.view(numpy.uint16).astype(numpy.uint32) << numpy.uint32(16)).view(numpy.float32)


def as_raw(values, dtype):
    """Raw bytes of f32 values; the small whole numbers used here are exact in bf16."""
    if dtype == "f32":
        return values.astype(numpy.float32).view(numpy.uint8)
    return (values.astype(numpy.float32).view(numpy.uint32) >> numpy.uint32(16)).astype(numpy.uint16).view(numpy.uint8)


def inputs(index, count, salt):
    """A rank's values: whole numbers below 8, so that sums of up to 16 ranks are exact in every type."""
    return ((numpy.arange(count) * 7 + index * 3 + salt) % 8).astype(numpy.float32)


class ReduceRank(Rank):
    """Buffer: the values, then one place for arriving parts per step and parity of the round."""

    def set_size(self, size):
        n = self.options.num_ranks
        item = 4 if self.options.dtype == "f32" else 2
        self.size, self.count, self.round = size, size // item, 0
        share = -(-self.count // n)
        self.cuts = [(min(i * share, self.count) * item, min((i + 1) * share, self.count) * item) for i in range(n)]

    def values(self, start, end):
        return as_float32(numpy.ascontiguousarray(self.memory.read(start, end - start)), self.options.dtype)

    def _arrival(self, step):
        slots = 2 * self.options.num_ranks
        return self.size * (1 + (self.round % 2) * slots + step)

    def _send(self, start, end, peer, step, tag, place=None):
        if end == start:
            self.tell(peer, tag)
            return
        handle = self.request(start, end - start, peer, self._arrival(step) if place is None else place, tag)
        self.agent.transfer(handle)
        self.finish(handle)
        self.agent.release_xfer_handle(handle)

    def _add(self, start, end, step):
        if end > start:
            arrived = self.values(self._arrival(step), self._arrival(step) + end - start)
            self.memory.write(as_raw(self.values(start, end) + arrived, self.options.dtype), start)

    def ring(self):
        n, me = self.options.num_ranks, self.index
        after, before = (me + 1) % n, (me - 1) % n
        for step in range(n - 1):
            tag = b"r%d.%d:" % (self.round, step)
            self._send(*self.cuts[(me - step) % n], after, step, tag)
            self.expect(before, tag)
            self._add(*self.cuts[(me - step - 1) % n], step)
        for step in range(n - 1):
            tag = b"g%d.%d:" % (self.round, step)
            start, end = self.cuts[(me + 1 - step) % n]
            # A sum goes straight to its place: its owner's part there was passed on in the steps before.
            self._send(start, end, after, 0, tag, start)
            self.expect(before, tag)

    def tree(self):
        me, n = self.index, self.options.num_ranks
        children = [child for child in (2 * me + 1, 2 * me + 2) if child < n]
        up, down = b"u%d:" % self.round, b"d%d:" % self.round
        for child in children:
            self.expect(child, up)
            self._add(0, self.size, (child - 1) % 2)
        if me:
            parent = (me - 1) // 2
            self._send(0, self.size, parent, (me - 1) % 2, up)
            self.expect(parent, down)
        for child in children:
            self._send(0, self.size, child, 0, down, 0)

    def step(self):
        (self.ring if self.options.algorithm == "ring" else self.tree)()
        self.round += 1

    def fill(self, salt):
        self.memory.write(as_raw(inputs(self.index, self.count, salt), self.options.dtype))

    def check(self, salt):
        wanted = sum(inputs(i, self.count, salt) for i in range(self.options.num_ranks))
        return first_difference(self.memory.read(0, self.size), as_raw(wanted, self.options.dtype))


class ReduceLane(GroupLane):
    def path(self):
        handle = self.own.request(0, 4, 1, 0, b"")
        path = self.own.agent.query_xfer_path(handle)
        self.own.agent.release_xfer_handle(handle)
        return f"{path}, {self.own.options.algorithm} of {self.own.options.num_ranks} ranks"


class AllReduce(GroupBenchmark):
    description = __doc__

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--num_ranks", type=int, default=2)
        parser.add_argument("--algorithm", choices=("ring", "tree"), default="ring")
        parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")

    def set_up(self):
        options = self.options
        if not 2 <= options.num_ranks <= 16:
            raise Usage(f"--num_ranks {options.num_ranks}; allowed: 2 to 16")
        largest = max(options.buffer_sizes)
        self.start(ReduceRank, options.num_ranks, largest * (1 + 4 * options.num_ranks), "every rank does the same, step by step")

    def make_lanes(self, size):
        if size % 4:
            raise Usage(f"--buffer_sizes: {size} is no whole number of elements")
        return [[ReduceLane(self.group, size)]]

    def notes(self):
        return [f"Bus bandwidth = bandwidth x {2 * (self.options.num_ranks - 1) / self.options.num_ranks:.3f}, "
                f"{self.options.dtype}, sizes {', '.join(map(format_size, self.options.buffer_sizes))}"]


if __name__ == "__main__":
    sys.exit(run(AllReduce))
