"""Two agents with a link between them that loses packets, is slow, is cut for a while, or for good. The link: support/wire.py."""

import subprocess
import sys
import textwrap
import time
import zlib

import pytest
from agents import need_backend
from wire import Wire

SIZE = 8 << 20
GIVEN_UP_S = 60  # UCX tries for about 20 s with data under way; machines are slow now and then
SIDE = textwrap.dedent(
    """
    import sys, zlib
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config
    name, size = sys.argv[1], int(sys.argv[2])
    one = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    memory = np.zeros(size, np.uint8)
    one.register_memory([memory])
    handles, sent, notifications = {}, [], []

    def fill(seed):
        memory[:] = np.random.default_rng(int(seed)).integers(0, 256, size, np.uint8)
        return zlib.crc32(memory)

    def crc():
        return zlib.crc32(memory)

    def meta():
        return one.get_agent_metadata().hex() + " " + str(memory.ctypes.data)

    def add(blob):
        return one.add_remote_agent(bytes.fromhex(blob)).decode()

    def post(op, address, other):
        h = one.initialize_xfer(op, one.get_xfer_descs([memory]), one.get_xfer_descs([(int(address), size, 0)], "DRAM"), other)
        handles[0] = h
        return one.transfer(h)

    def wait(seconds):
        return handles[0].wait(float(seconds))

    def notify(other, count):
        for _ in range(int(count)):
            one.send_notif(other, b"%d" % len(sent))
            sent.append(other)

    def notified(other):
        notifications.extend(int(text) for text in one.get_new_notifs().get(other, []))
        return notifications == list(range(len(notifications))) and len(notifications)

    def knows(other):
        return one.check_remote_metadata(other)

    print("ready", flush=True)
    for line in sys.stdin:
        verb, *words = line.split()
        try:
            print("ok", globals()[verb](*words), flush=True)
        except Exception as error:
            print(type(error).__name__, str(error).replace("\\n", " "), flush=True)
    """
)


class Side:
    """An agent in a process of its own; a method's name is a verb of SIDE, what it returns a text."""

    def __init__(self, name, device, prefix=()):
        # Two namespaces of one host look like one host to UCX: device and transport are named, so that it takes no short cut.
        env = [f"UCX_NET_DEVICES={device}", "UCX_TLS=tcp", "NIXL_SAME_HOST=n", "NIXL_LOG_LEVEL=ERROR"]
        command = [*prefix, "env", *env, sys.executable, "-c", SIDE, name, str(SIZE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self):
        for line in self.process.stdout:
            if not line.startswith("20"):  # the package's log
                return line.strip()
        raise AssertionError(f"the agent's process ended with {self.process.wait()}")

    def say(self, *words):
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def ask(self, *words):
        self.say(*words)
        return self._line()

    def ok(self, *words):
        answer = self.ask(*words)
        assert answer.startswith("ok "), f"{words[0]}: {answer}"
        return answer[3:]

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def wire():
    need_backend("UCX")
    with Wire() as wire:
        yield wire


@pytest.fixture
def sides(wire):
    """Two agents that know each other and have exchanged a first notification."""
    near, far = Side("near", wire.devices[0]), Side("far", wire.devices[1], wire.prefix)
    try:
        (near.blob, near.address), (far.blob, far.address) = (side.ok("meta").split() for side in (near, far))
        near.ok("add", far.blob), far.ok("add", near.blob)
        near.ok("notify", "far", 1), far.ok("notify", "near", 1)
        until_notified(near, "far", 1), until_notified(far, "near", 1)
        yield near, far
    finally:
        near.close(), far.close()


def until_notified(side, other, count, seconds=60):
    deadline = time.monotonic() + seconds
    while (seen := side.ok("notified", other)) != str(count):
        assert seen != "False", "notifications were lost, repeated or overtaken"
        assert time.monotonic() < deadline, f"{seen} of {count} notifications"
        time.sleep(0.01)


def move_both_ways(near, far, seconds=120):
    for number, op in enumerate(("WRITE", "READ")):
        source, target = (near, far) if op == "WRITE" else (far, near)
        want = source.ok("fill", number + 1)
        target.ok("fill", 99)
        near.ok("post", op, far.address, "far")
        assert near.ok("wait", seconds) == "DONE"
        assert target.ok("crc") == want


@pytest.mark.parametrize("loss, delay", [(0.03, 0.0), (0.0, 0.03), (0.01, 0.01)])
def test_lossy_and_slow(wire, sides, loss, delay):
    near, far = sides
    wire.loss, wire.delay = loss, delay
    move_both_ways(near, far)
    near.ok("notify", "far", 200), far.ok("notify", "near", 200)
    until_notified(near, "far", 201), until_notified(far, "near", 201)
    assert wire.lost > 0 or not loss


def cut_within_a_transfer(wire, near, far):
    wire.delay = 0.005
    before = wire.passed
    near.ok("post", "WRITE", far.address, "far")
    while wire.passed < before + 100:
        time.sleep(0.001)
    wire.cut = True


def test_cut_for_a_while(wire, sides):
    """Three seconds without a packet, in the middle of a transfer and of notifications: everything arrives, once."""
    near, far = sides
    want = near.ok("fill", 1)
    far.ok("fill", 99)
    cut_within_a_transfer(wire, near, far)
    lost = wire.lost
    near.ok("notify", "far", 50)
    assert near.ok("wait", 3) == "PROC"
    assert wire.lost > lost
    wire.cut = False
    assert near.ok("wait", GIVEN_UP_S) == "DONE"
    assert far.ok("crc") == want
    until_notified(far, "near", 51)
    move_both_ways(near, far)


def test_cut_for_good(wire, sides):
    """The transfer ends with an error that names the peer; with a new link and new metadata the two work again."""
    near, far = sides
    cut_within_a_transfer(wire, near, far)
    start = time.monotonic()
    answer = near.ask("wait", GIVEN_UP_S)
    assert "nixlRemoteDisconnectError" in answer and "far" in answer, answer
    assert time.monotonic() - start < GIVEN_UP_S
    wire.cut, wire.delay = False, 0.0
    far.close()
    again = Side("far", wire.devices[1], wire.prefix)
    try:
        again.blob, again.address = again.ok("meta").split()
        again.ok("add", near.blob)
        near.ok("add", again.blob)
        move_both_ways(near, again)
    finally:
        again.close()
