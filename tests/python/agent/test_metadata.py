"""Metadata: bytes, partial, loading rules (10.2, 10.3), sockets (11.1)."""
import contextlib
import os
import random
import resource
import socket
import struct
import time

import nixl
import numpy as np
import pytest
from agents import agent, done, introduce, stderr_text, until
from nixl._api import nixl_agent, nixl_agent_config


def fresh(name, backend="LOOPBACK", size=4096, **config):
    one = agent(name, backend, **config)
    one.memory = np.full(size, ord(name[0]), np.uint8)
    one.regs = one.register_memory([one.memory])
    return one


def test_loading_is_additive_and_idempotent():
    a, b = fresh("a"), fresh("b")
    for _ in range(3):
        assert a.add_remote_agent(b.get_agent_metadata()) == b"b"
    more = np.zeros(64, np.uint8)
    b.register_memory([more])
    assert not a.check_remote_metadata("b", a.get_xfer_descs([more]))
    a.add_remote_agent(b.get_agent_metadata())
    assert a.check_remote_metadata(b"b", a.get_xfer_descs([more]))
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory[:64]]), a.get_xfer_descs([more]), b"b")
    a.transfer(h)
    done(a, h)
    assert (more == a.memory[:64]).all()


def test_registering_again_gives_a_new_key_that_replaces():
    a, b = fresh("a"), fresh("b")
    introduce(a, b)
    b.deregister_memory(b.regs)
    b.register_memory([b.memory])
    a.add_remote_agent(b.get_agent_metadata())
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "b")
    a.transfer(h)
    done(a, h)


def test_deregistered_target_is_refused():
    a, b = fresh("a"), fresh("b")
    introduce(a, b)
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "b")
    b.deregister_memory(b.regs)
    with pytest.raises(nixl.nixlBackendError, match="deregistered"):
        a.transfer(h)
    assert (b.memory == ord("b")).all()


def test_refusals():
    a, b, b2 = fresh("a"), fresh("b"), fresh("b")
    good = b.get_agent_metadata()
    for bad in (b"", b"garbage", good[:-1], good + b"x", good[:30] + b"\xff" + good[31:]):
        with pytest.raises(nixl.nixlMismatchError):
            a.add_remote_agent(bad)
    with pytest.raises(nixl.nixlMismatchError, match="version 9.*version 2"):
        a.add_remote_agent(good[:8] + struct.pack("<H", 9) + good[10:])
    with pytest.raises(nixl.nixlInvalidParamError):
        a.add_remote_agent(a.get_agent_metadata())
    a.add_remote_agent(good)
    with pytest.raises(nixl.nixlNotAllowedError, match="remove it first"):
        a.add_remote_agent(b2.get_agent_metadata())
    assert a.check_remote_metadata("b", a.get_xfer_descs([b.memory]))  # the failed load changed nothing
    a.remove_remote_agent("b")
    a.remove_remote_agent("never known")
    assert not a.check_remote_metadata("b")
    assert a.add_remote_agent(b2.get_agent_metadata()) == b"b"


def test_mutated_blobs_never_load_or_crash():
    a, b = fresh("a"), fresh("b")
    good = bytearray(b.get_agent_metadata())
    rng = random.Random(3)
    for _ in range(500):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        if bad != good:
            with pytest.raises(nixl.nixlMismatchError):
                a.add_remote_agent(bytes(bad))
    assert not a.check_remote_metadata("b")


def test_no_backend_in_common():
    a = fresh("a")
    storage = agent("s", "POSIX")
    blob = storage.get_agent_metadata()
    assert blob
    with pytest.raises(nixl.nixlBackendError, match="shares no backend"):
        a.add_remote_agent(blob)


@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_partial_metadata(backend):
    a, b = fresh("a", backend), fresh("b", backend)
    extra = np.zeros(128, np.uint8)
    regs = b.register_memory([extra])
    only_descs = b.get_partial_agent_metadata(regs)
    with pytest.raises(nixl.nixlNotFoundError, match="connection"):
        a.add_remote_agent(only_descs)
    assert not a.check_remote_metadata("b")
    a.add_remote_agent(b.get_partial_agent_metadata([]))
    assert a.check_remote_metadata("b") and not a.check_remote_metadata("b", a.get_xfer_descs([extra]))
    a.add_remote_agent(only_descs)
    assert a.check_remote_metadata("b", a.get_xfer_descs([extra]))
    assert not a.check_remote_metadata("b", a.get_xfer_descs([b.memory]))
    c = fresh("c", backend)
    c.add_remote_agent(b.get_partial_agent_metadata(regs, inc_conn_info=True, backends=[backend]))
    assert c.check_remote_metadata("b", a.get_xfer_descs([extra]))
    with pytest.raises(nixl.nixlNotFoundError):
        b.get_partial_agent_metadata(b.get_reg_descs([np.zeros(8, np.uint8)]))
    with pytest.raises(nixl.nixlBackendError):
        agent("s", "POSIX").get_partial_agent_metadata([])


def test_unknown_agent():
    a = fresh("a")
    assert a.check_remote_metadata("ghost") is False
    assert a.check_remote_metadata("ghost", a.get_xfer_descs([a.memory])) is False
    for call in (lambda: a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([a.memory]), "ghost"),
                 lambda: a.prep_xfer_dlist("ghost", a.get_xfer_descs([a.memory])),
                 lambda: a.send_notif("ghost", b"x"), lambda: a.make_connection("ghost")):
        with pytest.raises(nixl.nixlNotFoundError, match="ghost"):
            call()


# ---- sockets

def listener(name, **config):
    return fresh(name, enable_listen_thread=True, listen_port=0, **config)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", "localhost"])
def test_guide_sequence(ip):
    if ip == "::1":
        try:
            socket.socket(socket.AF_INET6).bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    target, initiator = listener("target"), fresh("initiator")
    assert initiator.get_listen_port() == 0 and target.get_listen_port() > 0
    initiator.fetch_remote_metadata("target", ip, target.get_listen_port())
    initiator.send_local_metadata(ip, target.get_listen_port())
    until(lambda: initiator.check_remote_metadata("target"))
    until(lambda: target.check_remote_metadata("initiator"))
    initiator.invalidate_local_metadata(ip, target.get_listen_port())
    until(lambda: not target.check_remote_metadata("initiator"))


def test_listener_with_a_secret(monkeypatch):
    """NIXL_LISTEN_SECRET: who knows it may fetch, send and invalidate; who does not is refused with a reason on both sides."""
    stranger, open_target = fresh("stranger"), listener("open")
    monkeypatch.setenv("NIXL_LISTEN_SECRET", "between us")
    target, friend = listener("target"), fresh("friend")
    monkeypatch.setenv("NIXL_LISTEN_SECRET", "something else")
    liar = fresh("liar")
    port = target.get_listen_port()
    with stderr_text() as said:
        for one in (stranger, liar):
            one.fetch_remote_metadata("target", "127.0.0.1", port)
            one.send_local_metadata("127.0.0.1", port)
        friend.fetch_remote_metadata("open", "127.0.0.1", open_target.get_listen_port())
        until(lambda: all(text in said() for text in (
            "agent target: metadata connection dropped: the caller does not use NIXL_LISTEN_SECRET",
            "agent target: metadata connection dropped: NIXL_LISTEN_SECRET differs",
            "agent open: metadata connection dropped: the caller uses NIXL_LISTEN_SECRET",
            "agent friend: metadata was not fetched", "NIXL_LISTEN_SECRET is set here and may not be there")), 40)
    friend.fetch_remote_metadata("target", "127.0.0.1", port)
    friend.send_local_metadata("127.0.0.1", port)
    until(lambda: friend.check_remote_metadata("target") and target.check_remote_metadata("friend"))
    friend.invalidate_local_metadata("127.0.0.1", port)
    until(lambda: not target.check_remote_metadata("friend"))
    assert not any(target.check_remote_metadata(name) for name in ("stranger", "liar"))
    assert not any(one.check_remote_metadata("target") for one in (stranger, liar))
    assert not friend.check_remote_metadata("open")


def test_wrong_name_in_the_answer_is_ignored():
    target, initiator = listener("target"), fresh("initiator")
    initiator.fetch_remote_metadata("somebody", "127.0.0.1", target.get_listen_port())
    initiator.fetch_remote_metadata("target", "127.0.0.1", target.get_listen_port())
    until(lambda: initiator.check_remote_metadata("target"))
    assert not initiator.check_remote_metadata("somebody")


def test_unreachable_address_returns_at_once():
    a = fresh("a")
    start = time.monotonic()
    a.fetch_remote_metadata("b", "10.255.255.1", 9)
    a.send_local_metadata("10.255.255.1", 9)
    a.invalidate_local_metadata("127.0.0.1", 1)
    assert time.monotonic() - start < 1  # the calls only queue
    start = time.monotonic()
    del a
    assert time.monotonic() - start < 5


def test_neither_address_nor_store(monkeypatch):
    monkeypatch.delenv("NIXL_ETCD_ENDPOINTS", raising=False)
    a = fresh("a")
    for call in (a.send_local_metadata, a.invalidate_local_metadata, lambda: a.fetch_remote_metadata("b"),
                 lambda: a.send_partial_agent_metadata(a.regs, label="x")):
        with pytest.raises(nixl.nixlInvalidParamError, match="NIXL_ETCD_ENDPOINTS"):
            call()


def test_taken_port_is_named():
    target = listener("target")
    with pytest.raises(RuntimeError, match=str(target.get_listen_port())):
        nixl_agent("other", nixl_agent_config(True, True, target.get_listen_port(), backends=[]))


def test_partial_metadata_by_socket_with_ten_thousand_descs():
    target, sender = listener("target"), agent("sender")
    block = np.zeros(10_000 * 64, np.uint8)
    regs = sender.register_memory([(block.ctypes.data + 64 * i, 64, 0) for i in range(10_000)], "DRAM")
    sender.send_partial_agent_metadata(regs, True, ip_addr="127.0.0.1", port=target.get_listen_port())
    until(lambda: target.check_remote_metadata("sender", regs.trim()))


def test_verb_inside_a_blob():
    target, sender = listener("target"), fresh("NIXLCOMM:INVLtarget")
    sender.send_local_metadata("127.0.0.1", target.get_listen_port())
    until(lambda: target.check_remote_metadata("NIXLCOMM:INVLtarget"))


@pytest.mark.parametrize("bytes_sent", [b"GET / HTTP/1.0\r\n\r\n", struct.pack("<Q", 1 << 40), struct.pack("<Q", 3) + b"abc",
                                        struct.pack("<Q", 20) + b"NIXLCOMM:NOPE1234567", struct.pack("<Q", 100) + b"NIXLCOMM:LOADgarb"])
def test_garbage_ends_only_its_own_connection(bytes_sent):
    target, other = listener("target"), fresh("other")
    with socket.create_connection(("127.0.0.1", target.get_listen_port())) as guest:
        guest.sendall(bytes_sent)
        other.send_local_metadata("127.0.0.1", target.get_listen_port())
        until(lambda: target.check_remote_metadata("other"))
        if len(bytes_sent) != 25:
            guest.settimeout(5)
            assert guest.recv(100) == b""


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_guest_that_asks_and_does_not_read_costs_one_answer():
    target, other = listener("target"), fresh("other")
    memory = np.zeros(16 * 20_000, np.uint8)
    rows = np.zeros((20_000, 3), np.uint64)
    rows[:, 0], rows[:, 1] = memory.ctypes.data + 16 * np.arange(20_000), 16
    target.register_memory(rows, "DRAM")
    answer = 8 + len("NIXLCOMM:LOAD") + len(target.get_agent_metadata())
    questions = 200
    with socket.create_connection(("127.0.0.1", target.get_listen_port()), timeout=20) as guest:
        before = resident_bytes()
        guest.sendall((struct.pack("<Q", 13) + b"NIXLCOMM:SEND") * questions)
        other.send_local_metadata("127.0.0.1", target.get_listen_port())
        until(lambda: target.check_remote_metadata("other"))  # which came after the questions
        assert resident_bytes() - before < 0.2 * questions * answer, "answers pile up"
        read = 0
        while read < questions * answer:
            got = len(guest.recv(1 << 20))
            assert got, f"{read} of {questions * answer} bytes came"
            read += got


def test_silent_guests_and_missing_descriptors_hold_up_nobody():
    """More connections than the listener keeps, none of which says anything; then a process without descriptors to accept one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    target, other = listener("target"), fresh("other")
    port = target.get_listen_port()
    guests = []
    try:
        for _ in range(1100):  # it keeps 1024
            guests.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        other.send_local_metadata("127.0.0.1", port)
        until(lambda: target.check_remote_metadata("other"))
        late = socket.socket()
        used = max(int(number) for number in os.listdir("/proc/self/fd")) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        spare = []
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        late.connect(("127.0.0.1", port))
        before = sum(os.times()[:2])
        time.sleep(0.5)
        assert sum(os.times()[:2]) - before < 0.25, "the listener spins while it has no descriptor for a caller"
        for number in spare:
            os.close(number)
        late.sendall(struct.pack("<Q", 13) + b"NIXLCOMM:SEND")
        late.settimeout(10)
        assert b"NIXLCOMM:LOAD" in late.recv(100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for guest in guests:
            guest.close()
