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

from utils.benchmark_base import Usage, run  # noqa: E402
from utils.memory import INITIATOR_FILL, first_difference, pattern  # noqa: E402
from utils.ranks import GroupBenchmark, GroupLane, Rank  # noqa: E402

TP_ROWS = 16


class PatternRank(Rank):
    """Ranks 0..I-1 are initiators, then for every target its leader and followers. All work on the word of rank 0."""

    requests = ()

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
        self.drop()
        self.roles()
        self.size, self.round = size, 0
        self.sources = set()
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

    def step(self):
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


class PatternLane(GroupLane):
    def wait_for_end(self):
        own = self.own
        for index in range(own.num_initiators, self.group.num_ranks):
            own.expect(index, b"holds %d:" % (own.round - 1))

    def path(self):
        return f"{self.own.agent.query_xfer_path(self.own.requests[0])}, {self.own.options.scheme}"

    def close(self):
        self._path = self.path()
        self.own.drop()
        self.path = lambda: self._path


class Hierarchical(GroupBenchmark):
    description = __doc__

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
            raise Usage(f"--scheme {options.scheme} does not fit {options.num_initiator_dev} initiators and "
                          f"{options.num_target_dev} targets")
        shares = TP_ROWS * options.num_initiator_dev * options.num_target_dev
        if any(size % shares for size in options.buffer_sizes):
            raise Usage(f"--buffer_sizes: multiples of {shares} are needed to be cut evenly")
        num_ranks = options.num_initiator_dev + options.num_target_dev * options.group_size
        self.start(PatternRank, num_ranks, max(options.buffer_sizes), "the scheme says who writes what")

    def make_lanes(self, size):
        return [[PatternLane(self.group, size)]]

    def notes(self):
        o = self.options
        return [f"Scheme: {o.scheme}, {o.num_initiator_dev} initiators, {o.num_target_dev} targets, groups of {o.group_size}; "
                "bandwidth counts the buffer once"]


if __name__ == "__main__":
    sys.exit(run(Hierarchical))
