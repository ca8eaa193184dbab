"""A group of rank processes with an agent each, all connected; rank 0 is the benchmark itself.

A benchmark derives its rank from Rank, its lane from GroupLane and itself from GroupBenchmark. The other ranks wait for a word
of rank 0, `do ...`, and do their part.
"""

import multiprocessing
import os
import sys
import time

from utils.benchmark_base import Benchmark, Failure, Lane, make_agent, warn_unused
from utils.memory import make_buffer

LIMIT_S = 60
SPINS = 50


class Rank:
    """One member: its agent, its buffer `memory`, and the places of all (`places[i]` = (name, address, bytes, kind, device)).

    A benchmark's rank has set_size(size), fill(salt), check(salt) -> offset of the first wrong byte or None, and step(): its share
    of one round."""

    def __init__(self, index, options, size, gpu=0):
        self.index, self.options, self.name = index, options, f"rank-{options.benchmark_group}-{index}"
        self.agent = make_agent(self.name, options)
        self.memory = make_buffer(options.initiator_mem, size, gpu, options.enable_vmm)
        self.registered = self.agent.register_memory([(self.memory.address, size, self.memory.device, "")], self.memory.kind)
        self.places, self._kept = [], {}

    def card(self):
        memory = self.memory
        return self.agent.get_agent_metadata(), (self.name, memory.address, memory.size, memory.kind, memory.device)

    def connect(self, cards):
        for index, (metadata, place) in enumerate(cards):
            if index != self.index:
                self.agent.add_remote_agent(metadata)
            self.places.append(place)

    def request(self, offset, size, peer, their_offset, tag):
        """A WRITE of a piece of our buffer into a piece of a peer's."""
        agent, place = self.agent, self.places[peer]
        local = agent.get_xfer_descs([(self.memory.address + offset, size, self.memory.device)], self.memory.kind)
        remote = agent.get_xfer_descs([(place[1] + their_offset, size, place[4])], place[3])
        return agent.initialize_xfer("WRITE", local, remote, place[0], tag)

    def finish(self, handle):
        agent = self.agent
        while agent.check_xfer_state(handle) != "DONE":
            os.sched_yield()

    def expect(self, peer, tag):
        """Takes the message that starts with `tag` from a peer; Failure when it dies or is late."""
        agent, name = self.agent, self.places[peer][0]
        deadline, misses = time.monotonic() + LIMIT_S, 0
        while True:
            for sender, messages in agent.get_new_notifs().items():
                self._kept.setdefault(sender, []).extend(messages)
            kept = self._kept.get(name, [])
            for position, message in enumerate(kept):
                if message.startswith(tag):
                    return kept.pop(position)
            misses += 1
            if misses < SPINS:
                continue
            os.sched_yield()  # more ranks than cores: the one waited for may need ours
            if not agent.check_remote_metadata(name):
                raise Failure(f"{name} is gone")
            if time.monotonic() > deadline:
                raise Failure(f"{name} did not send {tag!r} within {LIMIT_S} s")

    def tell(self, peer, message):
        self.agent.send_notif(self.places[peer][0], message)

    def drop(self):
        """Gives back what set_size() made."""

    def serve(self):
        while True:
            what, _, number = self.expect(0, b"do ")[3:].partition(b" ")
            if what == b"stop":
                self.drop()
                return
            if what == b"size":
                self.set_size(int(number))
            elif what == b"fill":
                self.fill(int(number))
            elif what == b"check":
                self.tell(0, b"checked %d" % (-1 if (bad := self.check(int(number))) is None else bad))
            elif what == b"step":
                self.step()
            if what in (b"size", b"fill"):
                self.tell(0, b"ready")

    def close(self):
        self.agent.deregister_memory(self.registered)
        self.memory.close()


def _run_rank(rank_class, index, options, size, gpu, pipe):
    try:
        rank = rank_class(index, options, size, gpu)
        pipe.send(rank.card())
        rank.connect(pipe.recv())
        pipe.send("connected")
        rank.serve()
        rank.close()
    except EOFError:
        pass
    except Failure as reason:
        raise SystemExit(f"rank {index}: {reason}") from None


class Group:
    """Starts the other ranks and connects them all; `own` is rank 0. `rank_class` derives from Rank."""

    def __init__(self, rank_class, num_ranks, options, size, gpus=(0,)):
        context = multiprocessing.get_context("spawn")
        self._others, self.num_ranks = [], num_ranks
        try:
            for index in range(1, num_ranks):
                pipe, theirs = context.Pipe()
                arguments = (rank_class, index, options, size, gpus[index % len(gpus)], theirs)
                process = context.Process(target=_run_rank, args=arguments, name=f"rank {index}", daemon=True)
                process.start()
                theirs.close()
                self._others.append((process, pipe))
            self.own = rank_class(0, options, size, gpus[0])
            cards = [self.own.card(), *(self._get(*other) for other in self._others)]
            for _, pipe in self._others:
                pipe.send(cards)
            self.own.connect(cards)
            for other in self._others:
                self._get(*other)
        except BaseException:
            self.kill()
            raise

    def _get(self, process, pipe):
        deadline = time.monotonic() + LIMIT_S
        while not pipe.poll(0.1):
            if not process.is_alive():
                raise Failure(f"{process.name} ended with {process.exitcode}")
            if time.monotonic() > deadline:
                raise Failure(f"{process.name} was not ready within {LIMIT_S} s")
        return pipe.recv()

    def tell_all(self, message):
        for index in range(1, len(self._others) + 1):
            self.own.tell(index, message)

    def close(self):
        self.tell_all(b"do stop")
        for process, _ in self._others:
            process.join(10)
        self.kill()
        self.own.close()

    def kill(self):
        for process, _ in self._others:
            if process.is_alive():
                process.kill()
            process.join()


class GroupLane(Lane):
    """Rounds of a group: `own` is rank 0. wait_for_end() of a round is the benchmark's."""

    def __init__(self, group, size):
        self.group, self.own, self.size = group, group.own, size
        self._everyone(b"do size %d" % size)
        self.own.set_size(size)

    def _everyone(self, word):
        self.group.tell_all(word)
        for index in range(1, self.group.num_ranks):
            self.own.expect(index, b"ready")

    def fill(self, salt):
        self._everyone(b"do fill %d" % salt)
        self.own.fill(salt)

    def post(self):
        self.group.tell_all(b"do step")
        self.own.step()
        self.wait_for_end()
        return True

    def wait_for_end(self):
        """By default a round has ended everywhere when it has for rank 0."""

    def check(self, salt):
        self.group.tell_all(b"do check %d" % salt)
        seen = [self.own.check(salt)]
        for index in range(1, self.group.num_ranks):
            bad = int(self.own.expect(index, b"checked ").split()[1])
            seen.append(bad if bad >= 0 else None)
        return next((bad for bad in seen if bad is not None), None)


class GroupBenchmark(Benchmark):
    """A benchmark whose set_up() calls start()."""

    sizes = "64KB,1MB,16MB"
    remote = True
    group = None

    def start(self, rank_class, num_ranks, size, why):
        """Starts the ranks with buffers of `size` bytes; `why` flags of a single initiator mean nothing here."""
        options = self.options
        warn_unused(options, ("operation", "batch_size", "num_threads", "pipeline_depth", "prepared_xfer", "recreate_xfer",
                              "reregister_mem", "target_mem", "target_seg_type"), why)
        options.batch_size = options.num_threads = options.pipeline_depth = 1
        options.recreate_xfer = options.reregister_mem = False
        options.target_mem = options.initiator_mem
        self.group = Group(rank_class, num_ranks, options, size)

    def tear_down(self):
        if self.group is None:
            return
        if sys.exc_info()[0] is not None:
            self.group.kill()
        else:
            self.group.close()
