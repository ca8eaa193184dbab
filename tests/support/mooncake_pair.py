"""Two agents in two processes with backend Mooncake, over the engine that NIXL_MOONCAKE_LIBRARY names: run as a program, once for an
engine, since a process opens one. Prints a line of JSON for every scenario: its name and "ok" or what went wrong."""
import json
import os
import signal
import subprocess
import sys
import time
import traceback

import numpy as np
from nixl import nixlBackendError, nixlNotFoundError, nixlRemoteDisconnectError
from nixl._api import nixl_agent, nixl_agent_config

BYTES = 1 << 22
PATIENCE_S = 20


def agent(name):
    return nixl_agent(name, nixl_agent_config(backends=["Mooncake"]))


def until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s"
        time.sleep(0.0005)


def answer(*words):
    print("=", *words, flush=True)  # other lines of its output are the log


def peer():
    """The other process: shows its memory, answers what is asked for over its pipes."""
    one = agent("peer")
    memory = np.full(BYTES, 9, np.uint8)
    registered = one.register_memory([memory])
    answer(one.get_agent_metadata().hex(), memory.ctypes.data)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "sum":
            answer(int(memory.sum(dtype=np.uint64)))
        elif word == "notif":
            notifs = until(lambda: one.get_new_notifs())
            answer(json.dumps({name: [text.decode() for text in texts] for name, texts in notifs.items()}))
        elif word == "reply":
            one.add_remote_agent(bytes.fromhex(rest[0]))
            one.send_notif("one", b"a reply")
            answer("sent")
        elif word == "deregister":
            one.deregister_memory(registered)
            answer("gone")


class Peer:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__, "peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        blob, address = self.line().split()
        self.metadata, self.address = bytes.fromhex(blob), int(address)

    def line(self):
        return next(line for line in self.process.stdout if line.startswith("= "))[2:].strip()

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return self.line()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Scenarios:
    def __init__(self):
        self.one = agent("one")
        self.memory = np.zeros(BYTES, np.uint8)
        self.one.register_memory([self.memory])
        self.meet(Peer())

    def meet(self, peer):
        self.peer = peer
        assert self.one.add_remote_agent(peer.metadata) in (b"peer", "peer")

    def request(self, op, pieces=1, message=b""):
        """The whole memory in pieces that cannot be joined: the near ones lie in reverse order."""
        size = BYTES // pieces
        here = [(self.memory.ctypes.data + i * size, size, 0) for i in reversed(range(pieces))]
        there = [(self.peer.address + i * size, size, 0) for i in range(pieces)]
        return self.one.initialize_xfer(op, self.one.get_xfer_descs(here, "DRAM"), self.one.get_xfer_descs(there, "DRAM"), "peer",
                                        message)

    def run(self, handle):
        self.one.transfer(handle)
        until(lambda: self.one.check_xfer_state(handle) == "DONE")

    def data_and_attached_notification(self):
        handle = self.request("READ")
        self.run(handle)
        assert (self.memory == 9).all() and self.one.query_xfer_backend(handle) == "Mooncake"
        self.memory[:] = np.arange(BYTES, dtype=np.uint64) % 251
        self.run(self.request("WRITE", 4096, b"written"))  # more than the engine takes at once
        assert json.loads(self.peer.ask("notif")) == {"one": ["written"]}
        assert int(self.peer.ask("sum")) == int(self.memory.sum(dtype=np.uint64))
        sent = self.memory.copy()
        self.memory[:] = 0
        self.run(self.request("READ", 4096))  # puts every piece back where it was
        assert (self.memory == sent).all()

    def messages_both_ways(self):
        self.one.send_notif("peer", b"hello")
        assert json.loads(self.peer.ask("notif")) == {"one": ["hello"]}
        assert self.peer.ask("reply", self.one.get_agent_metadata().hex()) == "sent"
        assert until(self.one.get_new_notifs) == {"peer": [b"a reply"]}

    def transfers_to_oneself(self):
        half = BYTES // 2
        self.memory[:half], self.memory[half:] = 5, 6
        descs = [self.one.get_xfer_descs([(self.memory.ctypes.data + at, half, 0)], "DRAM") for at in (0, half)]
        self.run(self.one.initialize_xfer("WRITE", descs[0], descs[1], "one"))
        assert (self.memory == 5).all()

    def removed_and_added_again(self):
        self.one.remove_remote_agent("peer")
        self.meet(self.peer)
        self.memory[:] = 7
        self.run(self.request("WRITE"))
        assert int(self.peer.ask("sum")) == 7 * BYTES

    def killed_and_started_again(self):
        self.one.transfer(handle := self.request("WRITE", 1024))
        self.peer.kill()
        start = time.monotonic()
        try:
            while time.monotonic() - start < PATIENCE_S:
                if self.one.check_xfer_state(handle) == "DONE":  # it was quicker
                    self.one.transfer(handle)
            raise AssertionError(f"the loss was not told within {PATIENCE_S} s")
        except (nixlRemoteDisconnectError, nixlNotFoundError):
            assert time.monotonic() - start < 10
        until(lambda: not self.one.check_remote_metadata("peer"))
        handle.release()
        self.meet(Peer())
        self.run(self.request("READ"))
        assert (self.memory == 9).all()

    def memory_that_is_taken_back(self):
        handle = self.request("WRITE")
        self.run(handle)
        assert self.peer.ask("deregister") == "gone"
        try:
            self.run(handle)
            raise AssertionError("written to memory that is not registered any more")
        except nixlBackendError as error:
            assert "peer" in str(error)


SCENARIOS = [name for name in vars(Scenarios) if name[0] != "_" and name not in ("meet", "request", "run")]


def main():
    scenarios = Scenarios()
    for name in SCENARIOS:
        try:
            getattr(scenarios, name)()
            outcome = "ok"
        except Exception:
            outcome = traceback.format_exc()
        answer(json.dumps([name, outcome]))
    scenarios.peer.kill()
    os._exit(0)  # the engine of the package takes a second to end


if __name__ == "__main__":
    peer() if sys.argv[1:] == ["peer"] else main()
