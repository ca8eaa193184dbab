"""A group of rank processes with an agent each, all connected; rank 0 is the benchmark itself.

The others run serve() of the benchmark's rank class: they wait for a word of rank 0, `do ...`, and do their part.
"""

import multiprocessing
import os
import time

from utils.benchmark_base import Failure, make_agent
from utils.memory import make_buffer

LIMIT_S = 60
SPINS = 50


class Rank:
    """One member: its agent, its buffer `memory`, and the places of all (`places[i]` = (name, address, bytes, kind, device))."""

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
    """Starts the other ranks and connects them all; `own` is rank 0. `rank_class` derives from Rank and has serve()."""

    def __init__(self, rank_class, num_ranks, options, size, gpus=(0,)):
        context = multiprocessing.get_context("spawn")
        self._others = []
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
