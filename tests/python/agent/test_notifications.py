"""Notifications (10.6)."""
import threading
import time

import nixl
import numpy as np
import pytest
from agents import agent, introduce, until
from nixl._api import nixl_agent, nixl_agent_config


def test_bytes_arrive_once_and_unchanged(pair):
    a, b = pair
    payload = bytes(range(256)) * 8
    a.send_notif("bob", payload)
    seen = until(lambda: b.get_new_notifs())
    assert seen == {"alice": [payload]} and b.get_new_notifs() == {}


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_of_bytes(kind):
    """What a socket or a message queue hands out goes in as it is."""
    a, b = agent("a"), agent("b")
    assert a.add_remote_agent(kind(b.get_agent_metadata())) == b"b"
    a.send_notif("b", kind(b"one\0two"))
    assert until(lambda: b.get_new_notifs()) == {"a": [b"one\0two"]}
    with pytest.raises(TypeError):
        a.send_notif("b", 3)
    with pytest.raises(TypeError):
        a.send_notif("b", memoryview(np.arange(4))[::2])


@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_without_progress_threads(backend):
    a, b = agent("a", backend, enable_prog_thread=False), agent("b", backend, enable_prog_thread=False)
    x, y = np.full(4096, 1, np.uint8), np.zeros(4096, np.uint8)
    a.register_memory([x]), b.register_memory([y])
    introduce(a, b)
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([x]), a.get_xfer_descs([y]), "b", b"n\0tif")
    state, seen = a.transfer(h), {}
    for _ in range(200_000):
        if state == "DONE" and seen:
            break
        state = a.check_xfer_state(h) if state != "DONE" else state
        if not seen:
            seen = b.get_new_notifs()
    assert state == "DONE" and seen == {"a": [b"n\0tif"]} and (x == y).all()
    for _ in range(100):
        a.get_new_notifs()
        assert b.get_new_notifs() == {}


def test_attached_notification_leaves_without_polls(pair):
    a, b = pair
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "bob", b"go")
    a.transfer(h)
    assert until(lambda: b.get_new_notifs()) == {"alice": [b"go"]}
    assert (b.memory == 1).all()


def test_tags(pair):
    a, b = pair
    messages = [b"req1:0", b"req2:0", b"x req1", b"", b"req1:1"]
    for message in messages:
        a.send_notif(b"bob", message)
    until(lambda: sum(map(len, b.update_notifs().values())) == 5)
    assert b.notifs["alice"] == messages  # in order
    assert not b.check_remote_xfer_done("alice", b"eq")
    assert b.check_remote_xfer_done("alice", b"eq", tag_is_prefix=False) and b.notifs["alice"][0] == b"req2:0"
    assert b.check_remote_xfer_done(b"alice", "req1") and b.notifs["alice"] == [b"req2:0", b"x req1", b""]
    assert b.check_remote_xfer_done("alice", b"")  # matches anything: the first goes
    assert b.notifs["alice"] == [b"x req1", b""]
    assert b.check_remote_xfer_done("alice", b"x") and b.check_remote_xfer_done("alice", b"") and b.notifs["alice"] == []
    assert not b.check_remote_xfer_done("alice", b"") and not b.check_remote_xfer_done("nobody", b"")


def test_to_itself(pair):
    a, _ = pair
    a.send_notif("alice", b"me")
    assert until(lambda: a.get_new_notifs()) == {"alice": [b"me"]}
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory[:64]]), a.get_xfer_descs([a.memory[64:128]]), "alice", b"save")
    a.transfer(h)
    assert until(lambda: a.get_new_notifs()) == {"alice": [b"save"]}


def test_chosen_backend(pair):
    a, b = pair
    name = next(iter(a.backends))
    a.send_notif(remote_agent_name="bob", notif_msg=b"x", backend=name)
    assert until(lambda: b.get_new_notifs(backends=[name])) == {"alice": [b"x"]}
    with pytest.raises(KeyError):
        a.send_notif("bob", b"x", backend="POSIX")


def test_receiver_needs_no_metadata_of_the_sender():
    a, b = agent("a"), agent("b")
    a.add_remote_agent(b.get_agent_metadata())
    a.send_notif("b", b"hello")
    assert until(lambda: b.get_new_notifs()) == {"a": [b"hello"]}


@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_names_that_are_not_utf8(backend):
    """A program in another language may be called anything: its messages arrive, and its name works in every call."""
    one = agent("plain", backend)
    strange = nixl.nixlAgent(b"\xff\xfe", nixl.nixlAgentConfig())
    strange.createBackend(backend, {})
    strange.loadRemoteMD(one.get_agent_metadata())
    strange.genNotif("plain", b"first"), strange.genNotif("plain", b"second")
    until(lambda: one.check_remote_xfer_done(b"\xff\xfe", b"second"))
    (sender, messages), = one.notifs.items()
    assert messages == [b"first"] and sender == "\udcff\udcfe"
    with pytest.raises(nixl.nixlNotFoundError, match="\udcff"):
        one.send_notif(sender, b"back")
    assert one.add_remote_agent(strange.getLocalMD()) == b"\xff\xfe" and one.check_remote_metadata(sender)
    one.send_notif(sender, b"back")
    assert until(lambda: strange.getNotifs({})) == {"plain": [b"back"]}
    assert nixl.nixlRemoteDList(nixl.DRAM_SEG, [(1, 2, 3, sender)])[0] == (1, 2, 3, sender)
    one.remove_remote_agent(sender)
    assert not one.check_remote_metadata(b"\xff\xfe")


class Slow(bytes):
    """A message at which threads change over."""

    def startswith(self, tag):
        found = super().startswith(tag)
        time.sleep(0.0005)
        return found


def test_each_thread_finds_its_own():
    """PY-80: threads that look for messages of one sender take none but theirs."""
    one, each, threads = agent("a"), 20, 4
    one.notifs["b"] = [Slow(b"%d" % thread) for _ in range(each) for thread in range(threads)]
    found = [0] * threads

    def take(thread):
        while one.check_remote_xfer_done("b", b"%d" % thread):
            found[thread] += 1

    workers = [threading.Thread(target=take, args=(thread,)) for thread in range(threads)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    assert found == [each] * threads and one.notifs["b"] == []


def test_agent_without_notification_backends():
    one = nixl_agent("s", nixl_agent_config(backends=["POSIX"]))
    assert one.get_new_notifs() == {}
    one.send_notif("s", b"note")
    assert one.get_new_notifs() == {"s": [b"note"]}
    with pytest.raises(nixl.nixlNotFoundError):
        one.send_notif("other", b"x")


def test_ten_thousand_from_four_threads(pair):
    a, b = pair
    each = 2500

    def send(thread):
        for i in range(each):
            a.send_notif("bob", f"{thread}:{i}".encode())

    threads = [threading.Thread(target=send, args=(t,)) for t in range(4)]
    [t.start() for t in threads]
    seen = []
    until(lambda: seen.extend(b.get_new_notifs().get("alice", [])) or len(seen) >= 4 * each, seconds=60)
    [t.join() for t in threads]
    assert len(seen) == len(set(seen)) == 4 * each and b.get_new_notifs() == {}
    for t in range(4):  # a thread's messages keep their order
        mine = [int(m.split(b":")[1]) for m in seen if m.startswith(b"%d:" % t)]
        assert mine == list(range(each))
