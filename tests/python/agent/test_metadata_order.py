"""Older metadata of an agent never undoes newer (docs/wire.md): by hand, by listener, by answers that cross, by a store."""
import base64
import json
import os
import socket
import struct
import urllib.request

import hosts
import nixl
import numpy as np
import pytest
from agents import agent, done, until

KINDS = ["LOOPBACK", "UCX"]


def writer(backend="LOOPBACK", **config):
    one = agent("a", backend, **config)
    one.memory = np.full(4096, ord("a"), np.uint8)
    one.register_memory([one.memory])
    return one


def owner(backend="LOOPBACK", **config):
    one = agent("b", backend, **config)
    one.memory = np.full(4096, ord("b"), np.uint8)
    return one


def knows(one, memory):
    return one.check_remote_metadata("b", one.get_xfer_descs([memory]))


def request(a, memory):
    return a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory[:memory.size]]), a.get_xfer_descs([memory]), "b")


def assert_moves(a, b, handle, memory):
    memory[:] = 0
    a.transfer(handle)
    done(a, handle, [b])
    assert (memory == a.memory[:memory.size]).all()


def two_lives(b):
    """The same memory registered twice, each time under a key of its own: (older, newer metadata)."""
    regs = b.register_memory([b.memory])
    older = b.get_agent_metadata()
    b.deregister_memory(regs)
    b.register_memory([b.memory])
    return older, b.get_agent_metadata()


@pytest.mark.parametrize("backend", KINDS)
def test_older_metadata_brings_no_old_key_back(backend):
    a, b = writer(backend), owner(backend)
    older, newer = two_lives(b)
    a.add_remote_agent(newer)
    handle = request(a, b.memory)
    assert a.add_remote_agent(older) == b"b"
    assert_moves(a, b, handle, b.memory)  # made before the older came
    assert_moves(a, b, request(a, b.memory), b.memory)


@pytest.mark.parametrize("backend", KINDS)
def test_what_full_metadata_does_not_hold_any_more_is_forgotten(backend):
    """A region that is gone would stand before a smaller one that begins at the same place."""
    a, b = writer(backend), owner(backend)
    regs = b.register_memory([b.memory])
    older = b.get_agent_metadata()
    a.add_remote_agent(older)
    gone = request(a, b.memory)
    b.deregister_memory(regs)
    part = b.memory[:1024]
    b.register_memory([part])
    newer = b.get_agent_metadata()
    a.add_remote_agent(newer)
    handle = request(a, part)
    for blob in (older, newer, older):
        assert not knows(a, b.memory)
        assert_moves(a, b, handle, part)
        assert_moves(a, b, request(a, part), part)
        with pytest.raises(nixl.nixlNotFoundError, match="deregistered"):
            a.transfer(gone)
        a.add_remote_agent(blob)
    b.register_memory([b.memory])
    a.add_remote_agent(b.get_agent_metadata())
    assert knows(a, b.memory)


def test_partial_and_full_in_any_order():
    b = owner("UCX")
    one, two = b.memory[:1024], b.memory[2048:]
    first = b.register_memory([one])
    full_1 = b.get_agent_metadata()
    part_1 = b.get_partial_agent_metadata(first)
    b.deregister_memory(first)
    again = b.register_memory([one])
    full_2 = b.get_agent_metadata()
    part_2 = b.get_partial_agent_metadata(again)
    part_3 = b.get_partial_agent_metadata(b.register_memory([two]))
    connection = b.get_partial_agent_metadata([])

    def after(*blobs):
        fresh = writer("UCX")
        for blob in blobs:
            fresh.add_remote_agent(blob)
        return fresh

    a = after(full_1, part_3, part_2, part_1, full_1, full_2, connection)
    assert knows(a, one) and knows(a, two)  # part_3 is newer than full_2 and stays; partial metadata takes nothing away
    for memory in (one, two):
        assert_moves(a, b, request(a, memory), memory)
    a = after(connection, part_2, part_1)
    assert_moves(a, b, request(a, one), one)
    a = after(connection, part_1, part_3)
    assert knows(a, one) and knows(a, two)
    a = after(full_1, part_2, full_1)
    assert_moves(a, b, request(a, one), one)

    b.deregister_memory(again)
    a = after(connection, part_2, part_3, b.get_agent_metadata(), part_2, full_2, full_1)
    assert not knows(a, one)
    assert_moves(a, b, request(a, two), two)


def test_a_new_life_counts_from_the_beginning():
    a, b = writer(), owner()
    for _ in range(5):
        older, newer = two_lives(b)
    a.add_remote_agent(newer)
    del b
    b = owner()  # the same name
    b.register_memory([b.memory])
    a.add_remote_agent(b.get_agent_metadata())
    assert_moves(a, b, request(a, b.memory), b.memory)
    with pytest.raises(nixl.nixlNotAllowedError):
        a.add_remote_agent(newer)
    assert_moves(a, b, request(a, b.memory), b.memory)


def test_removal_is_a_new_beginning():
    a, b = writer(), owner()
    b.register_memory([b.memory])
    older = b.get_agent_metadata()
    more = np.zeros(64, np.uint8)
    b.register_memory([more])
    a.add_remote_agent(b.get_agent_metadata())
    a.remove_remote_agent("b")
    a.add_remote_agent(older)
    assert knows(a, b.memory) and not knows(a, more)


def test_a_backend_made_later_takes_what_comes():
    """What is newest is asked for each backend: one that has loaded nothing yet takes the older metadata."""
    a, b = agent("a", "UCX"), owner("LOOPBACK")
    a.memory = b.memory.copy()
    b.create_backend("UCX")
    b.register_memory([b.memory])
    older = b.get_agent_metadata()
    b.register_memory([np.zeros(64, np.uint8)])
    a.add_remote_agent(b.get_agent_metadata())
    a.create_backend("LOOPBACK")
    a.register_memory([a.memory], backends=["LOOPBACK"])
    a.add_remote_agent(older)
    handle = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "b", backends=["LOOPBACK"])
    assert_moves(a, b, handle, b.memory)


# ---- by listener

def frame(payload):
    return struct.pack("<Q", len(payload)) + payload


def load_frame(blob):
    return frame(b"NIXLCOMM:LOAD" + blob)


def test_a_listener_is_told_the_older_last():
    a, b, c = writer("UCX", enable_listen_thread=True, listen_port=0), owner("UCX"), agent("c", "UCX")
    older, newer = two_lives(b)
    with socket.create_connection(("127.0.0.1", a.get_listen_port()), timeout=10) as guest:
        guest.sendall(load_frame(newer))
        until(lambda: a.check_remote_metadata("b"))
        handle = request(a, b.memory)
        guest.sendall(load_frame(older) + load_frame(c.get_agent_metadata()))
        until(lambda: a.check_remote_metadata("c"))  # frames of one connection are taken in turn
    assert_moves(a, b, handle, b.memory)


def test_the_answer_to_the_first_question_comes_last():
    """A question is repeated because its answer is late; both answers come, the older one last."""
    a, b = writer("UCX"), owner("UCX")
    late = np.zeros(64, np.uint8)
    regs = b.register_memory([b.memory])
    b.register_memory([late])
    older = b.get_agent_metadata()
    b.deregister_memory(regs)
    b.register_memory([b.memory])
    newer = b.get_partial_agent_metadata(b.get_reg_descs([b.memory]), True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        port = server.getsockname()[1]
        a.fetch_remote_metadata("b", "127.0.0.1", port)
        first = server.accept()[0]
        a.fetch_remote_metadata("b", "127.0.0.1", port)
        second = server.accept()[0]
        with first, second:
            second.sendall(load_frame(newer))
            until(lambda: knows(a, b.memory))
            handle = request(a, b.memory)
            first.sendall(load_frame(older))
            until(lambda: knows(a, late))  # known from the older only: nothing newer says that it is gone
    assert_moves(a, b, handle, b.memory)


# ---- by a store

@pytest.fixture
def etcd(tmp_path, monkeypatch):
    with hosts.etcd_server(tmp_path) as (endpoint, _):
        monkeypatch.setenv("NIXL_ETCD_ENDPOINTS", endpoint)
        monkeypatch.setenv("NIXL_ETCD_NAMESPACE", "/order")
        yield endpoint


def test_a_store_tells_the_older_last(etcd):
    """As when two threads of the peer publish and the slower one writes last."""
    a, b = writer("UCX"), owner("UCX")
    older, newer = two_lives(b)
    more = np.zeros(64, np.uint8)
    part = b.get_partial_agent_metadata(b.register_memory([more]), True)

    def put(label, blob):
        body = {"key": base64.b64encode(f"{os.environ['NIXL_ETCD_NAMESPACE']}/b/{label}".encode()).decode(),
                "value": base64.b64encode(blob).decode()}
        urllib.request.urlopen(f"{etcd}/v3/kv/put", json.dumps(body).encode(), timeout=5).close()

    put("metadata", newer)
    a.fetch_remote_metadata("b")
    until(lambda: a.check_remote_metadata("b"))
    handle = request(a, b.memory)
    put("metadata", older)
    put("layers", part)
    until(lambda: knows(a, more))  # changes are applied in the order in which they are told
    assert_moves(a, b, handle, b.memory)
