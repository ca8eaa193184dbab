#!/usr/bin/env python3
"""The four patterns between groups of rank processes, in two levels: leaders of groups first, then inside the groups.

  pairwise   initiator i writes its buffer to target i
  manytoone  every initiator writes its part into one target
  onetomany  one initiator writes the same buffer to every target
  tp         a matrix cut by columns over the initiators is re-cut over the targets
With --group_size g, g-1 ranks follow every target: what it received it passes on to them."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from utils.benchmark_base import Benchmark, Failure, Lane, run, warn_unused  # noqa: E402
from utils.memory import INITIATOR_FILL, first_difference, pattern  # noqa: E402
from utils.ranks import Group, Rank  # noqa: E402

TP_ROWS = 16


class PatternRank(Rank):
    """Ranks 0..I-1 are initiators, then for every target its leader and followers. All work on the word of rank 0."""

    def roles(self):
        o = self.options
        self.num_initiators, self.num_targets = o.num_initiator_dev, o.num_target_dev
        self.is_initiator = self.index < self.num_initiators
        place = self.index - self.num_initiators
        self.target, self.follower = divmod(place, o.group_size) if place >= 0 else (-1, 0)

    def leader(self, target):
        return self.num_initiators + target * self.options.group_size

    def moves(self):
        """(initiator, target, offset there, offset here, bytes, rows): what initiators write; rows > 1 are strided."""
        size, scheme = self.size, self.options.scheme
        if scheme == "pairwise":
            return [(i, i, 0, 0, size) for i in range(self.num_initiators)]
        if scheme == "manytoone":
            part = size // self.num_initiators
            return [(i, 0, i * part, i * part, part) for i in range(self.num_initiators)]
        if scheme == "onetomany":
            return [(0, t, 0, 0, size) for t in range(self.num_targets)]
        wide, narrow = size // TP_ROWS // self.num_initiators, size // TP_ROWS // self.num_targets
        moves = []
        for i in range(self.num_initiators):
            for t in range(self.num_targets):
                start, end = max(i * wide, t * narrow), min((i + 1) * wide, (t + 1) * narrow)
                if start < end:
                    moves += [(i, t, row * narrow + start - t * narrow, row * wide + start - i * wide, end - start)
                              for row in range(TP_ROWS)]
        return moves

    def set_size(self, size):
        self.roles()
        self.size, self.round = size, 0
        self.requests, self.sources = [], set()
        by_target = {}
        for initiator, target, there, here, length in self.moves():
            if initiator == self.index:
                by_target.setdefault(target, []).append((here, there, length))
            if not self.is_initiator and target == self.target and self.follower == 0:
                self.sources.add(initiator)
        for target, pieces in by_target.items():
            self.requests.append(self._list(self.leader(target), pieces))
        if not self.is_initiator and self.follower == 0:
            extent = self.held()
            self.requests = [self._list(self.index + f, [(0, 0, extent)]) for f in range(1, self.options.group_size)]

    def held(self):
        return self.size // self.num_targets if self.options.scheme == "tp" else self.size

    def _list(self, peer, pieces):
        agent, place, memory = self.agent, self.places[peer], self.memory
        local = agent.get_xfer_descs([(memory.address + here, length, memory.device) for here, _, length in pieces], memory.kind)
        remote = agent.get_xfer_descs([(place[1] + there, length, place[4]) for _, there, length in pieces], place[3])
        return agent.initialize_xfer("WRITE", local, remote, place[0], b"part")

    def _write_all(self, tag):
        for handle in self.requests:
            self.agent.transfer(handle, tag)
        for handle in self.requests:
            self.finish(handle)

    def move(self):
        """This rank's share of one round; leaders and followers tell rank 0 when they hold everything."""
        tag = b"part %d:" % self.round
        self.round += 1
        if self.is_initiator:
            self._write_all(tag)
            return
        for source in self.sources if self.follower == 0 else [self.leader(self.target)]:
            self.expect(source, tag)
        if self.follower == 0:
            self._write_all(tag)
        self.tell(0, b"holds %d:" % (self.round - 1))

    def whole(self, salt):
        """What the initiators hold together (or each, where they do not share)."""
        return pattern(self.size, self.options.pattern, INITIATOR_FILL, salt)

    def wanted(self, salt):
        scheme = self.options.scheme
        if scheme == "pairwise":
            return pattern(self.size, self.options.pattern, INITIATOR_FILL, salt * 100 + self.target)
        if scheme == "tp":
            narrow = self.size // TP_ROWS // self.num_targets
            return self.whole(salt).reshape(TP_ROWS, -1)[:, self.target * narrow:(self.target + 1) * narrow].reshape(-1)
        return self.whole(salt)

    def fill(self, salt):
        if not self.is_initiator:
            self.memory.write(pattern(self.size, self.options.pattern, 0, salt + 50))
        elif self.options.scheme == "pairwise":
            self.memory.write(pattern(self.size, self.options.pattern, INITIATOR_FILL, salt * 100 + self.index))
        elif self.options.scheme == "tp":
            wide = self.size // TP_ROWS // self.num_initiators
            self.memory.write(self.whole(salt).reshape(TP_ROWS, -1)[:, self.index * wide:(self.index + 1) * wide].reshape(-1))
        else:
            self.memory.write(self.whole(salt))

    def check(self, salt):
        return None if self.is_initiator else first_difference(self.memory.read(0, self.held()), self.wanted(salt))

    def drop(self):
        for handle in self.requests:
            self.agent.release_xfer_handle(handle)
        self.requests = []

    def serve(self):
        self.requests = []
        while True:
            what, _, number = self.expect(0, b"do ")[3:].partition(b" ")
            if what == b"stop":
                self.drop()
                return
            if what == b"size":
                self.drop()
                self.set_size(int(number))
            elif what == b"fill":
                self.fill(int(number))
            elif what == b"check":
                self.tell(0, b"checked %d" % (-1 if (bad := self.check(int(number))) is None else bad))
            elif what == b"move":
                self.move()
            if what in (b"size", b"fill"):
                self.tell(0, b"ready")


class PatternLane(Lane):
    def __init__(self, group, num_ranks, size):
        self.group, self.own, self.num_ranks = group, group.own, num_ranks
        self._everyone(b"do size %d" % size)
        self.own.set_size(size)

    def _everyone(self, word):
        self.group.tell_all(word)
        for index in range(1, self.num_ranks):
            self.own.expect(index, b"ready")

    def fill(self, salt):
        self._everyone(b"do fill %d" % salt)
        self.own.fill(salt)

    def post(self):
        own = self.own
        number = own.round
        self.group.tell_all(b"do move")
        own.move()
        for index in range(own.num_initiators, self.num_ranks):
            own.expect(index, b"holds %d:" % number)
        return True

    def check(self, salt):
        self.group.tell_all(b"do check %d" % salt)
        seen = [int(self.own.expect(index, b"checked ").split()[1]) for index in range(1, self.num_ranks)]
        return next((bad for bad in seen if bad >= 0), None)

    def path(self):
        return f"{self.own.agent.query_xfer_path(self.own.requests[0])}, {self.own.options.scheme}"

    def close(self):
        self._path = self.path()
        self.own.drop()
        self.path = lambda: self._path


class Hierarchical(Benchmark):
    sizes = "64KB,1MB,16MB"
    description = __doc__
    remote = True

    @classmethod
    def add_flags(cls, parser):
        parser.add_argument("--scheme", choices=("pairwise", "manytoone", "onetomany", "tp"), default="pairwise")
        parser.add_argument("--num_initiator_dev", type=int, default=1)
        parser.add_argument("--num_target_dev", type=int, default=1)
        parser.add_argument("--group_size", type=int, default=2, help="a target and the ranks that follow it")

    def set_up(self):
        options = self.options
        wrong = {"pairwise": options.num_initiator_dev != options.num_target_dev, "manytoone": options.num_target_dev != 1,
                 "onetomany": options.num_initiator_dev != 1, "tp": False}[options.scheme]
        if wrong or min(options.num_initiator_dev, options.num_target_dev, options.group_size) < 1:
            raise Failure(f"--scheme {options.scheme} does not fit {options.num_initiator_dev} initiators and "
                          f"{options.num_target_dev} targets")
        warn_unused(options, ("operation", "num_threads", "pipeline_depth", "batch_size", "recreate_xfer", "reregister_mem"),
                    "the scheme says who writes what")
        options.batch_size = options.num_threads = options.pipeline_depth = 1
        options.recreate_xfer = options.reregister_mem = False
        options.target_mem = options.initiator_mem
        shares = TP_ROWS * options.num_initiator_dev * options.num_target_dev
        if any(size % shares for size in options.buffer_sizes):
            raise Failure(f"--buffer_sizes: multiples of {shares} are needed to be cut evenly")
        self.num_ranks = options.num_initiator_dev + options.num_target_dev * options.group_size
        self.group = Group(PatternRank, self.num_ranks, options, max(options.buffer_sizes))

    def make_lanes(self, size):
        return [[PatternLane(self.group, self.num_ranks, size)]]

    def notes(self):
        o = self.options
        return [f"Scheme: {o.scheme}, {o.num_initiator_dev} initiators, {o.num_target_dev} targets, groups of {o.group_size}; "
                "bandwidth counts the buffer once"]

    def tear_down(self):
        if not hasattr(self, "group"):
            return
        if sys.exc_info()[0] is not None:
            self.group.kill()
            return
        self.group.close()


if __name__ == "__main__":
    sys.exit(run(Hierarchical))
