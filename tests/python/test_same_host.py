"""The same-host path as agents see it: chosen by itself, told by query_xfer_path, switched off in both ways, and peers that die,
stop, restart or give their memory back."""

import base64
import os
import pathlib
import signal
import sys
import time

import numpy
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("nixl._native", reason="the nixl package is not built")

import nixl  # noqa: E402

from utils.helper_process import HelperProcess  # noqa: E402
from utils.memory import HostBuffer, pattern  # noqa: E402

pytestmark = pytest.mark.timeout(90)
SIZE = 8 << 20


class Pair:
    def __init__(self, name="initiator", prog_thread=True, **config):
        self.agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=prog_thread, backends=["UCX"], **config))
        self.near = HostBuffer(SIZE)
        self.registered = self.agent.register_memory([(self.near.address, SIZE, 0, "")], "DRAM")
        self.restart()

    def restart(self):
        self.helper = HelperProcess("target")
        self.address = self.helper.ask(do="allocate", kind="DRAM", size=SIZE)["address"]
        self.agent.add_remote_agent(self.helper.metadata())

    def request(self, operation="WRITE", size=SIZE, message=b""):
        local = self.agent.get_xfer_descs([(self.near.address, size, 0)], "DRAM")
        remote = self.agent.get_xfer_descs([(self.address, size, 0)], "DRAM")
        return self.agent.initialize_xfer(operation, local, remote, "target", message)

    def run(self, handle, limit_s=20):
        state, deadline = self.agent.transfer(handle), time.monotonic() + limit_s
        while state != "DONE":
            state = self.agent.check_xfer_state(handle)
            assert time.monotonic() < deadline
        return state

    def close(self):
        self.agent.deregister_memory(self.registered)
        self.helper.close()


@pytest.fixture
def pair():
    held = Pair()
    yield held
    held.close()


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_taken_by_itself_and_told(pair, operation):
    pair.near.write(pattern(SIZE, 1, 0xBB))
    pair.helper.ask(do="fill", number=2, fill=0xAA)
    handle = pair.request(operation)
    pair.run(handle)
    assert pair.agent.query_xfer_backend(handle) == "UCX"
    assert pair.agent.query_xfer_path(handle) == "cma"
    import zlib

    number, fill = (1, 0xBB) if operation == "WRITE" else (2, 0xAA)
    wanted = zlib.crc32(pattern(SIZE, number, fill))
    seen = pair.helper.ask(do="crc", offset=0, size=SIZE)["crc"] if operation == "WRITE" else zlib.crc32(pair.near.read())
    assert seen == wanted
    duration, margin, method = pair.agent.estimate_xfer_cost(handle)
    assert 0 < duration < 1_000_000 and margin > 0 and method == "ANALYTICAL_BACKEND"
    pair.agent.release_xfer_handle(handle)


@pytest.mark.parametrize("how", ["environment", "parameter"])
def test_switched_off(how, monkeypatch):
    config = {}
    if how == "environment":
        monkeypatch.setenv("NIXL_SAME_HOST", "n")
    else:
        config["backend_params"] = {"UCX": {"same_host": "false"}}
    held = Pair(f"off-by-{how}", **config)
    handle = held.request()
    held.run(handle)
    assert held.agent.query_xfer_path(handle) != "cma"
    held.agent.release_xfer_handle(handle)
    held.close()


def huge_bytes(buffer):
    """How much of a buffer of this process is in huge pages."""
    total, ours = 0, False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            ours = begin < buffer.address + buffer.size and end > buffer.address
        elif ours and first == "AnonHugePages:":
            total += int(line.split()[1]) << 10
    return total


@pytest.mark.parametrize("how", ["default", "environment", "parameter"])
def test_memory_of_a_connected_peer_becomes_huge(how, monkeypatch):
    mode = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        pytest.skip(f"no transparent huge pages: {mode} is missing or says never")
    if "[always]" in mode.read_text():
        pytest.skip(f"every page is huge already: {mode} says always")
    config = {}
    if how == "environment":
        monkeypatch.setenv("NIXL_SAME_HOST_HUGE_PAGES", "n")
    elif how == "parameter":
        config["backend_params"] = {"UCX": {"same_host_huge_pages": "false"}}
    held = Pair(f"huge-by-{how}", **config)
    try:
        held.near.write(pattern(SIZE, 7, 0))
        held.helper.ask(do="load", blob=base64.b64encode(held.agent.get_agent_metadata()).decode())
        deadline = time.monotonic() + (20 if how == "default" else 1)
        while huge_bytes(held.near) < SIZE - (4 << 20) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert huge_bytes(held.near) >= SIZE - (4 << 20) if how == "default" else huge_bytes(held.near) == 0
        assert numpy.array_equal(held.near.read(), pattern(SIZE, 7, 0))
    finally:
        held.close()


def test_killed_peer_and_its_successor_of_the_same_name(pair):
    handle = pair.request()
    pair.run(handle)
    pair.helper.process.kill()
    pair.helper.process.wait()
    with pytest.raises((nixl.nixlRemoteDisconnectError, nixl.nixlNotFoundError)):
        for _ in range(1000):
            pair.run(handle)
    deadline = time.monotonic() + 5
    while pair.agent.check_remote_metadata("target"):
        assert time.monotonic() < deadline, "the loss was not noticed"
    pair.helper.process.stdin.close()
    pair.helper.process.stdout.close()
    pair.restart()
    with pytest.raises(nixl.nixlNotFoundError):
        pair.agent.transfer(handle)
    pair.agent.release_xfer_handle(handle)
    again = pair.request()
    pair.run(again)
    assert pair.agent.query_xfer_path(again) == "cma"
    pair.agent.release_xfer_handle(again)


def test_a_stopped_peer_receives_all_the_same(pair):
    pid = pair.helper.process.pid
    pair.near.write(pattern(SIZE, 5, 0))
    handle = pair.request(message=b"while stopped")
    os.kill(pid, signal.SIGSTOP)
    try:
        pair.run(handle)
    finally:
        os.kill(pid, signal.SIGCONT)
    import zlib

    assert pair.helper.ask(do="crc", offset=0, size=SIZE)["crc"] == zlib.crc32(pattern(SIZE, 5, 0))
    pair.agent.release_xfer_handle(handle)


def test_memory_given_back_is_not_written(pair):
    handle = pair.request(size=4096)
    pair.run(handle)
    pair.helper.ask(do="allocate", kind="DRAM", size=SIZE)  # deregisters the first buffer
    with pytest.raises(nixl.nixlError, match="deregistered"):
        pair.run(handle)
    pair.agent.release_xfer_handle(handle)


def test_own_memory_freed_under_a_request_is_an_error(pair):
    import mmap

    mapping = mmap.mmap(-1, SIZE)
    array = numpy.frombuffer(mapping, dtype=numpy.uint8)
    registered = pair.agent.register_memory([(array.ctypes.data, SIZE, 0, "")], "DRAM")
    local = pair.agent.get_xfer_descs([(array.ctypes.data, SIZE, 0)], "DRAM")
    remote = pair.agent.get_xfer_descs([(pair.address, SIZE, 0)], "DRAM")
    handle = pair.agent.initialize_xfer("WRITE", local, remote, "target")
    pair.run(handle)
    del array
    mapping.close()
    with pytest.raises(nixl.nixlBackendError, match="freed while registered"):
        pair.run(handle)
    pair.agent.release_xfer_handle(handle)
    pair.agent.deregister_memory(registered)


def test_descriptors_and_mappings_stay_constant_over_peers():
    held = Pair("many")

    def footprint():
        return len(os.listdir("/proc/self/fd")), sum(1 for line in open("/proc/self/maps") if "nixl-samehost" in line)

    before = None
    for _ in range(6):
        held.run(request := held.request(size=4096))
        held.agent.release_xfer_handle(request)
        held.agent.remove_remote_agent("target")
        held.helper.close()
        held.restart()
        deadline = time.monotonic() + 10
        while before is not None and footprint() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        if before is None:
            before = footprint()
    fds, maps = footprint()
    assert fds <= before[0] + 1 and maps <= before[1]
    held.close()


def test_the_other_process_of_the_benchmarks_may_log(monkeypatch):
    """Lines of the log and the answer that arrive in one piece."""
    from utils import helper_process

    monkeypatch.setattr(helper_process, "ANSWER_LIMIT_S", 10)
    helper = HelperProcess("talker")
    helper.ask(do="hello")
    original, helper.process.stdout = helper.process.stdout, os.fdopen(_pipe_with(b'log\nlog\n{"pid": 1}\n'))
    assert helper.answer() == {"pid": 1}
    helper.process.stdout.close()
    helper.process.stdout = original
    helper.close()


def _pipe_with(content):
    """The reading end of a pipe that holds `content` and stays open."""
    reading, writing = os.pipe()
    os.write(writing, content)
    return reading
