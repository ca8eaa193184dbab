"""Metadata through stores: a real etcd (11.2, 11.3) and torch's TCPStore (11.4)."""
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import nixl
import numpy as np
import hosts
import pytest
from agents import agent, done, until


@pytest.fixture(scope="module")
def etcd_server(tmp_path_factory):
    with hosts.etcd_server(tmp_path_factory.mktemp("etcd")) as (endpoint, _):
        yield endpoint


@pytest.fixture
def etcd(etcd_server, monkeypatch, request):
    monkeypatch.setenv("NIXL_ETCD_ENDPOINTS", etcd_server)
    monkeypatch.setenv("NIXL_ETCD_NAMESPACE", f"/test/{request.node.name.translate(str.maketrans('[]/', '___'))}")
    return etcd_server


def with_memory(name, backend="LOOPBACK", **config):
    one = agent(name, backend, **config)
    one.memory = np.full(4096, ord(name[0]), np.uint8)
    one.regs = one.register_memory([one.memory])
    return one


def test_explicit_calls(etcd):
    a, b = with_memory("a"), with_memory("b")
    b.send_local_metadata()
    a.fetch_remote_metadata("b")
    until(lambda: a.check_remote_metadata("b"))
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "b")
    a.transfer(h)
    done(a, h)
    b.invalidate_local_metadata()
    until(lambda: not a.check_remote_metadata("b"), 20)  # the deletion is watched


def test_reader_waits_for_a_late_writer(etcd):
    a, b = with_memory("a"), with_memory("b")
    a.fetch_remote_metadata("b")
    time.sleep(0.5)
    assert not a.check_remote_metadata("b")
    b.send_local_metadata()
    until(lambda: a.check_remote_metadata("b"))


def test_watch_timeout_of_the_environment(etcd, monkeypatch):
    monkeypatch.setenv("NIXL_ETCD_WATCH_TIMEOUT", "300000")  # microseconds
    one = with_memory("a", use_etcd=True)
    start = time.monotonic()
    with pytest.raises(nixl.nixlNotFoundError):
        one.make_connection("nobody")
    assert 0.25 < time.monotonic() - start < 3
    monkeypatch.setenv("NIXL_ETCD_WATCH_TIMEOUT", "5s")
    with pytest.raises((RuntimeError, ValueError), match="NIXL_ETCD_WATCH_TIMEOUT"):
        agent("b")


def test_labels(etcd):
    a, b = with_memory("a"), with_memory("b")
    with pytest.raises(nixl.nixlInvalidParamError, match="label"):
        b.send_partial_agent_metadata(b.regs, True)
    b.send_partial_agent_metadata(b.regs, True, label="layers")
    a.fetch_remote_metadata("b", label="layers")
    until(lambda: a.check_remote_metadata("b", a.get_xfer_descs([b.memory])))


def test_invalidation_takes_the_whole_prefix(etcd):
    """Also keys that an earlier life of the agent has left."""
    a, b = with_memory("a"), with_memory("b")
    b.send_partial_agent_metadata(b.regs, True, label="layers")
    a.fetch_remote_metadata("b", label="layers")
    until(lambda: a.check_remote_metadata("b"))
    bb = with_memory("bb")
    bb.send_local_metadata()
    again = with_memory("b")  # has published nothing
    again.invalidate_local_metadata()
    until(lambda: not a.check_remote_metadata("b"))
    a.fetch_remote_metadata("bb")
    until(lambda: a.check_remote_metadata("bb"))  # a longer name is another agent


def test_changes_are_followed(etcd):
    a, b = with_memory("a"), with_memory("b")
    b.send_local_metadata()
    a.fetch_remote_metadata("b")
    until(lambda: a.check_remote_metadata("b"))
    more = np.zeros(64, np.uint8)
    b.register_memory([more])
    b.send_local_metadata()
    until(lambda: a.check_remote_metadata("b", a.get_xfer_descs([more])))


@pytest.mark.parametrize("writer,reader", [("/ns", "/ns/"), ("/ns/", "/ns"), ("/ns", "/ns")])
def test_namespace_with_and_without_slash(etcd, monkeypatch, writer, reader):
    base = os.environ["NIXL_ETCD_NAMESPACE"]
    monkeypatch.setenv("NIXL_ETCD_NAMESPACE", base + writer)
    b = with_memory("b")
    b.send_local_metadata()
    monkeypatch.setenv("NIXL_ETCD_NAMESPACE", base + reader)
    a = with_memory("a")
    a.fetch_remote_metadata("b")
    until(lambda: a.check_remote_metadata("b"))


def test_discovery_without_any_call(etcd):
    a, b = with_memory("a", use_etcd=True), with_memory("b", use_etcd=True)
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([a.memory]), a.get_xfer_descs([b.memory]), "b", b"hi")
    a.transfer(h)
    done(a, h)
    assert until(lambda: b.get_new_notifs()) == {"a": [b"hi"]} and (b.memory == ord("a")).all()
    assert not b.check_remote_metadata("a")
    until(lambda: b.check_remote_metadata("a"))
    start = time.monotonic()
    with pytest.raises(nixl.nixlNotFoundError, match="nobody"):
        a.send_notif("nobody", b"x")
    assert 4 < time.monotonic() - start < 30
    del h, b
    until(lambda: not a.check_remote_metadata("b"), 20)


def test_key_of_a_killed_agent_goes_away(etcd):
    code = textwrap.dedent("""
        import sys
        from nixl._api import nixl_agent, nixl_agent_config
        one = nixl_agent("mortal", nixl_agent_config(backends=["UCX"], use_etcd=True))
        print("up", flush=True)
        sys.stdin.read()
        """)
    a = with_memory("a", "UCX")
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert any(line.strip() == "up" for line in child.stdout)
        a.fetch_remote_metadata("mortal")
        until(lambda: a.check_remote_metadata("mortal"), 20)
        child.send_signal(signal.SIGKILL)
        child.wait()
        until(lambda: not a.check_remote_metadata("mortal"), 40)
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:  # until the lease is over, a fetch still finds the old key
            b = agent("late", "UCX")
            b.fetch_remote_metadata("mortal")
            time.sleep(2)
            if not b.check_remote_metadata("mortal"):
                return
        raise AssertionError("the key outlived its lease by far")
    finally:
        child.kill()
        child.wait()


def test_unreachable_etcd_is_a_warning(monkeypatch):
    monkeypatch.setenv("NIXL_ETCD_ENDPOINTS", "http://127.0.0.1:1")
    start = time.monotonic()
    a = with_memory("a")
    a.send_local_metadata()
    a.fetch_remote_metadata("b")
    assert time.monotonic() - start < 4 and not a.check_remote_metadata("b")
    del a
    assert time.monotonic() - start < 20


def test_tcp_store_of_torch(monkeypatch):
    torch = pytest.importorskip("torch.distributed")
    server = torch.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("NIXL_TCPSTORE_ENDPOINT", f"127.0.0.1:{server.port}")
    a, b = with_memory("a"), with_memory("b")
    a.fetch_remote_metadata("b")
    b.send_local_metadata()
    until(lambda: a.check_remote_metadata("b"))
    # torch puts a slash before the keys of its callers
    until(lambda: server.check(["nixl/agents/metadata/b/NULL_AGENT"]))
    assert server.get("nixl/agents/metadata/b/NULL_AGENT")[:8] == b"NIXLMETA"
    b.send_partial_agent_metadata(b.regs, True, label="part")
    until(lambda: server.check(["nixl/agents/part/b/NULL_AGENT"]))
    b.invalidate_local_metadata()
    until(lambda: not server.check(["nixl/agents/metadata/b/NULL_AGENT"]))
