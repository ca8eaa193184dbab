"""A peer that dies, is stopped, or comes back (10.5)."""
import os
import signal
import subprocess
import sys
import textwrap
import time

import nixl
import numpy as np
import pytest
from agents import agent, done, until

PEER = textwrap.dedent("""
    import sys, time
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config
    one = nixl_agent("peer", nixl_agent_config(backends=["UCX"]))
    memory = np.full(1 << 20, 9, np.uint8)
    one.register_memory([memory])
    print(one.get_agent_metadata().hex(), memory.ctypes.data, flush=True)
    for line in sys.stdin:
        if line.strip() == "notifs":
            print(sum(map(len, one.update_notifs().values())), flush=True)
""")


class Peer:
    """An agent in a process of its own."""

    def __init__(self):
        env = dict(os.environ, NIXL_LOG_LEVEL="WARN")
        self.process = subprocess.Popen([sys.executable, "-c", PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        line = next(line for line in self.process.stdout if not line.startswith("20"))  # past the log
        blob, address = line.split()
        self.metadata, self.address = bytes.fromhex(blob), int(address)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def peers():
    made = []

    def make():
        made.append(Peer())
        return made[-1]

    yield make
    for peer in made:
        if peer.process.poll() is None:
            peer.process.send_signal(signal.SIGCONT)
            peer.kill()


@pytest.fixture
def one():
    a = agent("survivor", "UCX")
    a.memory = np.zeros(1 << 20, np.uint8)
    a.register_memory([a.memory])
    return a


def request(one, peer, op="READ"):
    there = one.get_xfer_descs([(peer.address, 1 << 20, 0)], "DRAM")
    return one.initialize_xfer(op, one.get_xfer_descs([one.memory]), there, "peer")


def ends_in_disconnect(one, h):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if one.check_xfer_state(h) == "DONE":
                one.transfer(h)
        except nixl.nixlRemoteDisconnectError as error:
            assert "peer" in error.reason
            return
    raise AssertionError("the loss was not reported within 20 s")


@pytest.mark.parametrize("moment", ["before the first post", "between transfers", "after a post"])
def test_killed_peer(one, peers, moment):
    peer = peers()
    one.add_remote_agent(peer.metadata)
    h = request(one, peer)
    if moment != "before the first post":
        one.transfer(h)
        if moment == "between transfers":
            done(one, h)
            assert (one.memory == 9).all()
    peer.kill()
    try:
        if moment != "after a post":
            one.transfer(h)
        ends_in_disconnect(one, h)
    except nixl.nixlRemoteDisconnectError:
        pass
    until(lambda: not one.check_remote_metadata("peer"), 20)
    for call in (lambda: one.transfer(h), lambda: request(one, peer), lambda: one.send_notif("peer", b"x")):
        with pytest.raises(nixl.nixlNotFoundError):
            call()
    h.release()
    again = peers()
    one.add_remote_agent(again.metadata)
    one.memory[:] = 0
    h = request(one, again)
    one.transfer(h)
    done(one, h)
    assert (one.memory == 9).all()


def test_restarted_peer_is_taken_at_once(one, peers):
    peer = peers()
    one.add_remote_agent(peer.metadata)
    h = request(one, peer)
    one.transfer(h)
    done(one, h)
    peer.kill()
    again = peers()
    assert one.add_remote_agent(again.metadata) == b"peer"  # nobody has told the survivor before
    h2 = request(one, again)
    one.transfer(h2)
    done(one, h2)
    with pytest.raises((nixl.nixlRemoteDisconnectError, nixl.nixlNotFoundError)):
        one.transfer(h)


def test_loss_is_noticed_in_the_background(one, peers):
    peer = peers()
    one.add_remote_agent(peer.metadata)
    one.make_connection("peer")
    h = request(one, peer)
    one.transfer(h)
    done(one, h)
    one.send_notif("peer", b"hello")
    peer.kill()
    until(lambda: not one.check_remote_metadata("peer"), 30)


@pytest.mark.parametrize("thread", [True, False])
@pytest.mark.parametrize("used", [True, False])
def test_a_peer_that_leaves_is_forgotten_without_a_warning(peers, capfd, thread, used):
    one = agent("survivor", "UCX", enable_prog_thread=thread)
    one.memory = np.zeros(1 << 20, np.uint8)
    one.register_memory([one.memory])
    peer = peers()
    one.add_remote_agent(peer.metadata)
    if used:
        h = request(one, peer)
        one.transfer(h)
        done(one, h)
        h.release()
    capfd.readouterr()
    peer.process.stdin.close()
    assert peer.process.wait(20) == 0
    until(lambda: not one.check_remote_metadata("peer"), 20)
    until(lambda: one.check_remote_metadata("peer") is False and not one.get_new_notifs(), 20)
    assert "WARN" not in capfd.readouterr().err


def test_stopped_peer_goes_on(one, peers):
    peer = peers()
    one.add_remote_agent(peer.metadata)
    h = request(one, peer, "WRITE")
    one.transfer(h)
    done(one, h)
    peer.process.send_signal(signal.SIGSTOP)
    for i in range(20):
        one.send_notif("peer", b"while stopped")
    peer.process.send_signal(signal.SIGCONT)
    for _ in range(1000):
        peer.process.stdin.write("notifs\n")
        peer.process.stdin.flush()
        if int(peer.process.stdout.readline()) == 20:
            break
    else:
        raise AssertionError("20 notifications did not arrive")


def test_nothing_is_left_of_dead_peers(one, peers):
    """File descriptors and mappings of a survivor over connect, kill, reconnect."""
    def held():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps)

    seen = []
    for round_ in range(8):
        peer = peers()
        one.add_remote_agent(peer.metadata)
        h = request(one, peer)
        one.transfer(h)
        done(one, h)
        peer.kill()
        one.remove_remote_agent("peer")
        h.release()
        seen.append(held())
    until(lambda: held()[0] <= seen[2][0] + 2, 20)
    assert seen[-1][1] <= seen[2][1] + 12, seen
