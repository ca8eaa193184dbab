"""OBJ through the Python package against a real S3 server, and against one whose connection a proxy spoils."""

import time

import numpy
import pytest

nixl = pytest.importorskip("nixl")
pytest.importorskip("moto", reason="moto is not installed: no S3 server to test against")

from fault_proxy import FaultProxy  # noqa: E402
from object_servers import S3Server  # noqa: E402

TIMEOUT = 60


@pytest.fixture(scope="module")
def server():
    with S3Server() as one:
        yield one


@pytest.fixture
def proxy(server):
    with FaultProxy(server.endpoint) as one:
        yield one


def make_agent(server, endpoint=None, **over):
    params = {**server.params(), "endpoint_override": endpoint or server.endpoint, **over}
    agent = nixl.nixl_agent("obj", nixl.nixl_agent_config(backends=[]))
    agent.create_backend("OBJ", params)
    return agent


class Rig:
    def __init__(self, agent):
        self.agent, self._next = agent, 1

    def request(self, operation, array, key, offset=0):
        self._next += 1
        memory = self.agent.register_memory([array])
        objects = self.agent.register_memory([(0, 0, self._next, key)], "OBJ")
        handle = self.agent.initialize_xfer(operation, self.agent.get_xfer_descs([array]),
                                            self.agent.get_xfer_descs([(offset, array.nbytes, self._next)], "OBJ"), self.agent.name)
        return handle, memory, objects

    def run(self, operation, array, key, offset=0):
        handle, memory, objects = self.request(operation, array, key, offset)
        try:
            if self.agent.transfer(handle) != "DONE":
                assert handle.wait(TIMEOUT) == "DONE"
            return self.agent.query_xfer_path(handle)
        finally:
            self.agent.release_xfer_handle(handle)
            self.agent.deregister_memory(objects)
            self.agent.deregister_memory(memory)


def pattern(size, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, size, dtype=numpy.uint8)


@pytest.mark.parametrize("size", [1, 4096, 1_000_001, 70 << 20])
def test_round_trip(server, size):
    rig = Rig(make_agent(server))
    out, back = pattern(size), numpy.zeros(size, numpy.uint8)
    assert rig.run("WRITE", out, f"rt {size}/ü") == "http+s3"
    rig.run("READ", back, f"rt {size}/ü")
    assert numpy.array_equal(out, back)


def test_read_any_offset_write_only_whole(server):
    rig = Rig(make_agent(server))
    out = pattern(100_000)
    rig.run("WRITE", out, "part")
    back = numpy.zeros(1000, numpy.uint8)
    rig.run("READ", back, "part", offset=12_345)
    assert numpy.array_equal(back, out[12_345:13_345])
    with pytest.raises(nixl.nixlInvalidParamError, match="offset 5"):
        rig.run("WRITE", back, "part", offset=5)


def test_query_memory_and_empty_meta(server):
    agent = make_agent(server)
    Rig(agent).run("WRITE", pattern(10), "here")
    rows = [(0, 0, 0, name) for name in ("here", "not here", "here", "")]
    assert agent.query_memory(rows, "OBJ", "OBJ") == [{}, None, {}, None]
    assert agent.query_memory([], "OBJ", "OBJ") == []


def test_one_id_for_two_keys_is_refused(server):
    agent = make_agent(server)
    agent.register_memory([(0, 0, 7, "one")], "OBJ")
    with pytest.raises(nixl.nixlInvalidParamError, match='"one" and cannot stand for "two"'):
        agent.register_memory([(0, 0, 7, "two")], "OBJ")
    agent.register_memory([(0, 0, 7, "one")], "OBJ")


@pytest.mark.parametrize("kind", ["503", "500", "reset", "truncate", "corrupt"])
def test_reads_survive(server, proxy, kind):
    rig = Rig(make_agent(server, proxy.endpoint))
    out, back = pattern(300_000, 3), numpy.zeros(300_000, numpy.uint8)
    rig.run("WRITE", out, f"read {kind}")
    proxy.add("GET", kind, times=2)
    rig.run("READ", back, f"read {kind}")
    assert numpy.array_equal(out, back)
    assert proxy.seen.count(f"GET {kind}") == 2


def test_a_slow_answer_is_waited_for(server, proxy):
    rig = Rig(make_agent(server, proxy.endpoint))
    out, back = pattern(300_000, 3), numpy.zeros(300_000, numpy.uint8)
    rig.run("WRITE", out, "slow answer")
    proxy.add("GET", "slow", delay=0.5)
    begin = time.monotonic()
    rig.run("READ", back, "slow answer")
    assert numpy.array_equal(out, back)
    assert time.monotonic() - begin >= 0.5 and proxy.seen.count("GET slow") == 1


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_writes_survive(server, proxy, kind):
    rig = Rig(make_agent(server, proxy.endpoint))
    out, back = pattern(300_000, 4), numpy.zeros(300_000, numpy.uint8)
    proxy.add("PUT", kind, times=2)
    rig.run("WRITE", out, f"write {kind}")
    rig.run("READ", back, f"write {kind}")
    assert numpy.array_equal(out, back)
    assert proxy.seen.count(f"PUT {kind}") == 2


def test_parts_survive(server, proxy):
    rig = Rig(make_agent(server, proxy.endpoint))
    out = pattern(70 << 20, 5)
    back = numpy.zeros_like(out)
    proxy.add("PUT", "503", times=2)
    proxy.add("PUT", "drop")
    proxy.add("POST", "500", times=2)
    rig.run("WRITE", out, "parts")
    proxy.add("GET", "reset", times=3)
    rig.run("READ", back, "parts")
    assert numpy.array_equal(out, back)


def test_a_part_that_fails_for_good_aborts_the_upload(server, proxy):
    rig = Rig(make_agent(server, proxy.endpoint))
    old, back = pattern(1000, 8), numpy.zeros(1000, numpy.uint8)
    rig.run("WRITE", old, "kept")
    proxy.add("PUT", "403")
    with pytest.raises(nixl.nixlBackendError, match='PUT of object "kept": HTTP 403'):
        rig.run("WRITE", pattern(70 << 20, 9), "kept")
    rig.run("READ", back, "kept")
    assert numpy.array_equal(old, back)
    deadline = time.monotonic() + TIMEOUT
    while "DELETE" not in proxy.seen and time.monotonic() < deadline:  # sent after the error was told
        time.sleep(0.01)
    assert "DELETE" in proxy.seen


@pytest.mark.parametrize("kind, text", [("503", "HTTP 503 SlowDown"), ("truncate", "of the answer"), ("corrupt", "checksum mismatch")])
def test_a_lasting_fault_is_an_error_with_its_cause(server, proxy, kind, text):
    rig = Rig(make_agent(server, proxy.endpoint))
    out, back = pattern(100_000, 6), numpy.zeros(100_000, numpy.uint8)
    rig.run("WRITE", out, f"lasting {kind}")
    proxy.add("GET", kind, times=100)
    with pytest.raises(nixl.nixlBackendError, match=text) as caught:
        rig.run("READ", back, f"lasting {kind}")
    if kind == "503":
        assert f'"lasting {kind}"' in str(caught.value) and "tried 6 times" in str(caught.value)


def test_missing_object_and_missing_rights_are_not_repeated(server, proxy):
    rig = Rig(make_agent(server, proxy.endpoint))
    back = numpy.zeros(10, numpy.uint8)
    with pytest.raises(nixl.nixlBackendError, match="404 NoSuchKey"):
        rig.run("READ", back, "never written")
    proxy.add("PUT", "403")
    with pytest.raises(nixl.nixlBackendError, match="HTTP 403"):
        rig.run("WRITE", back, "forbidden")
    assert [line for line in proxy.seen if line.startswith("PUT")] == ["PUT 403"]


def test_others_are_unharmed(server, proxy):
    agent = make_agent(server, proxy.endpoint)
    rig = Rig(agent)
    out = pattern(100_000, 7)
    rig.run("WRITE", out, "fine")
    fine, lost = numpy.zeros_like(out), numpy.zeros(10, numpy.uint8)
    bad, good = rig.request("READ", lost, "no such")[0], rig.request("READ", fine, "fine")[0]
    agent.transfer(bad)
    agent.transfer(good)
    assert good.wait(TIMEOUT) == "DONE"
    assert numpy.array_equal(out, fine)
    with pytest.raises(nixl.nixlBackendError):
        bad.wait(TIMEOUT)


def test_release_in_flight(server, proxy):
    agent = make_agent(server, proxy.endpoint)
    rig = Rig(agent)
    rig.run("WRITE", pattern(1000), "slow")
    back = numpy.zeros(1000, numpy.uint8)
    proxy.add("GET", "hang")
    handle = rig.request("READ", back, "slow")[0]
    assert agent.transfer(handle) == "PROC"
    agent.cancel_xfer(handle)
    with pytest.raises(nixl.nixlCancelledError):
        handle.wait(TIMEOUT)
    handle.release()


def test_server_killed_in_mid_request():
    with S3Server() as own, FaultProxy(own.endpoint) as proxy:
        agent = make_agent(own, proxy.endpoint)
        rig = Rig(agent)
        rig.run("WRITE", pattern(100_000), "k")
        proxy.add("GET", "slow", delay=0.2)
        back = numpy.zeros(100_000, numpy.uint8)
        handle = rig.request("READ", back, "k")[0]
        agent.transfer(handle)
        own.stop()
        proxy.__exit__()
        with pytest.raises(nixl.nixlBackendError, match="GET http://127.0.0.1"):
            handle.wait(TIMEOUT)


def test_creation_errors(server, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_BUCKET", raising=False)
    with pytest.raises(nixl.nixlBackendError, match="AWS_DEFAULT_BUCKET"):
        make_agent(server, bucket="")
    with pytest.raises(nixl.nixlBackendError, match="127.0.0.1:1"):
        make_agent(server, "http://127.0.0.1:1")
    with pytest.raises(nixl.nixlBackendError, match="libcuobjclient.so"):
        make_agent(server, accelerated="true")
    monkeypatch.setenv("AWS_DEFAULT_BUCKET", server.bucket)
    monkeypatch.setenv("AWS_ENDPOINT_OVERRIDE", server.endpoint)
    Rig(make_agent(server, bucket="", endpoint_override="")).run("WRITE", pattern(10), "by environment")
