"""Peers that are not what they seem: two of one name, metadata played again, memory that is gone."""
import signal
import subprocess
import sys
import textwrap

import nixl
import numpy as np
import pytest
from agents import agent, done, until

SIZE = 1 << 16
PEER = textwrap.dedent("""
    import ctypes, mmap, sys
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config
    one = nixl_agent("twin", nixl_agent_config(backends=["UCX"]))
    size, mapping = int(sys.argv[1]), mmap.mmap(-1, int(sys.argv[1]))
    memory = np.frombuffer(mapping, np.uint8)
    regs = one.register_memory([memory])

    def say(*words):
        print(*words, flush=True)

    say("ready")
    for line in sys.stdin:
        verb, *words = line.split()
        if verb == "meta":
            say(one.get_agent_metadata().hex(), memory.ctypes.data)
        elif verb == "first":
            say(memory[0])
        elif verb == "add":
            say(one.add_remote_agent(bytes.fromhex(words[0])).decode())
        elif verb == "notify":
            one.send_notif(words[0], words[1].encode())
            say("sent")
        elif verb == "again":  # the same memory, under a new key
            one.deregister_memory(regs)
            regs = one.register_memory([memory])
            say("registered")
        elif verb == "unmap":
            # Nothing else may come to lie there meanwhile: an inaccessible page range takes its place.
            libc = ctypes.CDLL(None)
            libc.mmap.argtypes, libc.mmap.restype = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long], ctypes.c_void_p
            private_anonymous_fixed = 0x02 | 0x20 | 0x10
            say("gone" if libc.mmap(memory.ctypes.data, size, 0, private_anonymous_fixed, -1, 0) == memory.ctypes.data else "failed")
    """)


class Twin:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", PEER, str(SIZE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"
        self.read()

    def line(self):
        return next(line for line in self.process.stdout if not line.startswith("20")).strip()  # past the log

    def ask(self, *words):
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        return self.line()

    def read(self):
        blob, address = self.ask("meta").split()
        self.metadata, self.address = bytes.fromhex(blob), int(address)

    def end(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def twins():
    made = []

    def make():
        made.append(Twin())
        return made[-1]

    yield make
    for twin in made:
        if twin.process.poll() is None:
            twin.end()


@pytest.fixture(params=["same host", "tcp"])
def one(request, monkeypatch):
    if request.param == "tcp":
        monkeypatch.setenv("NIXL_SAME_HOST", "n")
        monkeypatch.setenv("UCX_TLS", "tcp")
    a = agent("one", "UCX")
    a.memory = np.zeros(SIZE, np.uint8)
    a.register_memory([a.memory])
    return a


def write(one, twin, value):
    one.memory[:] = value
    h = one.initialize_xfer("WRITE", one.get_xfer_descs([one.memory]), one.get_xfer_descs([(twin.address, SIZE, 0)], "DRAM"), "twin")
    try:
        one.transfer(h)
        done(one, h)
    finally:
        h.release()


def test_two_living_agents_of_one_name(one, twins):
    first, second = twins(), twins()
    assert one.add_remote_agent(first.metadata) == b"twin"
    for _ in range(3):
        with pytest.raises(nixl.nixlNotAllowedError, match="another incarnation that may still live; remove it first"):
            one.add_remote_agent(second.metadata)
    write(one, first, 1)
    assert (first.ask("first"), second.ask("first")) == ("1", "0")
    for twin in (first, second):  # both may speak; the name is what they share
        assert twin.ask("add", one.get_agent_metadata().hex()) == "one"
        assert twin.ask("notify", "one", "from" + str(twin.process.pid)) == "sent"
    heard = []
    until(lambda: heard.extend(one.get_new_notifs().get("twin", [])) or len(heard) == 2, 30)
    assert sorted(heard) == sorted(b"from%d" % twin.process.pid for twin in (first, second))
    one.remove_remote_agent("twin")
    assert one.add_remote_agent(second.metadata) == b"twin"
    write(one, second, 2)
    assert (first.ask("first"), second.ask("first")) == ("1", "2")


def test_metadata_played_again(one, twins):
    twin = twins()
    old = twin.metadata
    one.add_remote_agent(old)
    twin.ask("again")
    twin.read()
    one.add_remote_agent(twin.metadata)
    write(one, twin, 3)
    one.add_remote_agent(old)  # its key means nothing any more, and is not taken for the newer one
    write(one, twin, 4)
    assert twin.ask("first") == "4"
    write(one, twin, 5)
    assert twin.ask("first") == "5"
    # The dead predecessor's, once its successor is known: refused. Alone: whoever is taken by it cannot be reached.
    twin.end()
    successor = twins()
    one.add_remote_agent(successor.metadata)
    with pytest.raises(nixl.nixlError):
        one.add_remote_agent(twin.metadata)
    write(one, successor, 6)
    assert successor.ask("first") == "6"
    one.remove_remote_agent("twin")
    with pytest.raises(nixl.nixlError):
        one.add_remote_agent(twin.metadata)
        write(one, twin, 7)
    until(lambda: not one.check_remote_metadata("twin"), 30)
    one.add_remote_agent(successor.metadata)
    write(one, successor, 8)
    assert successor.ask("first") == "8"


def test_memory_that_its_owner_unmapped(one, twins):
    """Who unmaps what it has registered breaks its own word; the one who writes there gets an error and lives on."""
    twin = twins()
    one.add_remote_agent(twin.metadata)
    write(one, twin, 1)
    assert twin.ask("unmap") == "gone"
    with pytest.raises(nixl.nixlError):
        for _ in range(3):
            write(one, twin, 2)
    other = twins()
    one.remove_remote_agent("twin")
    one.add_remote_agent(other.metadata)
    write(one, other, 3)
    assert other.ask("first") == "3"
