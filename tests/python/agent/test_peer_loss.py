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


def test_an_application_that_is_busy_while_it_connects_loses_nobody(peers, monkeypatch):
    """Without a progress thread nothing is heard while the application computes; that is no fault of the peer's."""
    monkeypatch.setenv("NIXL_SAME_HOST", "n")
    busy = agent("busy", "UCX", enable_prog_thread=False)
    busy.memory = np.zeros(1 << 20, np.uint8)
    busy.register_memory([busy.memory])
    peer = peers()
    busy.add_remote_agent(peer.metadata)
    time.sleep(11)  # the application's own work; a peer has 10 s to answer
    h = request(busy, peer)
    busy.transfer(h)
    done(busy, h)
    assert (busy.memory == 9).all()


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


MANY_PEERS = textwrap.dedent("""
    import os, signal, sys
    import numpy as np
    from nixl._api import nixl_agent, nixl_agent_config
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            one = nixl_agent("peer", nixl_agent_config(backends=["UCX"]))
            memory = np.full(1 << 20, int(line), np.uint8)
            one.register_memory([memory])
            print(one.get_agent_metadata().hex(), memory.ctypes.data, os.getpid(), flush=True)
            while True:
                signal.pause()
        os.waitpid(child, 0)
""")


def held():
    """File descriptors, mappings and resident bytes of this process."""
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as sizes:
        return len(os.listdir("/proc/self/fd")), sum(1 for _ in maps), int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("same_host", [True, False])
def test_nothing_is_left_of_dead_peers(monkeypatch, same_host):
    """A survivor over many rounds of connect, transfer, SIGKILL, reconnect; the loss is found, or told, or seen from the new metadata."""
    rounds = 1000 if os.environ.get("NIXL_TEST_ALL") == "1" else 8
    monkeypatch.setenv("NIXL_SAME_HOST", "y" if same_host else "n")
    one = agent("survivor", "UCX")
    one.memory = np.zeros(1 << 20, np.uint8)
    one.register_memory([one.memory])
    seen = []
    with subprocess.Popen([sys.executable, "-c", MANY_PEERS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=dict(os.environ, NIXL_LOG_LEVEL="WARN")) as server:
        try:
            for turn in range(rounds):
                server.stdin.write(f"{turn % 200 + 1}\n")
                server.stdin.flush()
                blob, address, pid = next(line for line in server.stdout if not line.startswith("20")).split()
                one.add_remote_agent(bytes.fromhex(blob))
                h = one.initialize_xfer("READ", one.get_xfer_descs([one.memory]),
                                        one.get_xfer_descs([(int(address), 1 << 20, 0)], "DRAM"), "peer")
                one.transfer(h)
                done(one, h)
                assert (one.memory == turn % 200 + 1).all()
                one.send_notif("peer", b"unread")
                os.kill(int(pid), signal.SIGKILL)
                if turn % 3 == 0:
                    one.remove_remote_agent("peer")
                elif turn % 3 == 1:
                    until(lambda: not one.check_remote_metadata("peer"), 30)
                h.release()
                seen.append(held())
        finally:
            server.kill()
    one.remove_remote_agent("peer")
    start = max(3, rounds // 10)  # caches are warm by then
    deadline = time.monotonic() + 20
    while held()[0] > seen[start][0] + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held()[0] <= seen[start][0] + 2, (held(), seen[::max(1, rounds // 20)])
    print(f"{rounds} rounds, same host {same_host}: (fds, mappings, resident bytes) {seen[start]} after {start + 1}, {seen[-1]} at the end")
    assert seen[-1][1] <= seen[start][1] + 12, seen[::max(1, rounds // 20)]
    assert seen[-1][2] <= seen[start][2] + (8 << 20), seen[::max(1, rounds // 20)]
