"""Telemetry (12.3): switches, per-request figures, the ring file, Prometheus."""
import gc
import socket
import struct
import urllib.request

import nixl
import numpy as np
import pytest
from agents import agent, done


def run_one(one, op="WRITE", size=64, count=2):
    memory = np.zeros(2 * size * count, np.uint8)
    one.register_memory([memory])
    rows = [(memory.ctypes.data + i * size, size, 0) for i in range(2 * count)]
    h = one.initialize_xfer(op, one.get_xfer_descs(rows[:count], "DRAM"), one.get_xfer_descs(rows[count:], "DRAM"), one.name)
    return memory, h


@pytest.mark.parametrize("enable,capture,on", [(None, False, False), (None, True, True), ("y", False, True), ("YES", False, True),
                                               ("no", True, False), ("Off", True, False)])
@pytest.mark.parametrize("backend", ["LOOPBACK", "UCX"])
def test_switches(monkeypatch, enable, capture, on, backend):
    monkeypatch.delenv("NIXL_TELEMETRY_ENABLE", raising=False)
    if enable:
        monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", enable)
    one = agent("t", backend, capture_telemetry=capture)
    memory, h = run_one(one)
    if not on:
        one.transfer(h)
        done(one, h)
        with pytest.raises(nixl.nixlNoTelemetryError):
            one.get_xfer_telemetry(h)
        return
    with pytest.raises(nixl.nixlNotPostedError):
        one.get_xfer_telemetry(h)
    one.transfer(h)
    done(one, h)
    seen = one.get_xfer_telemetry(h)
    assert (seen.descCount, seen.totalBytes, seen.backendName) == (2, 128, backend)
    assert seen.startTime >= 1 and seen.xferDuration >= seen.postDuration >= 1
    with pytest.raises(AttributeError):
        seen.totalBytes = 1


def test_bad_settings(monkeypatch):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "carrier-pigeon")
    with pytest.raises(RuntimeError, match="carrier-pigeon"):
        agent("t")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "NOP")
    monkeypatch.setenv("NIXL_TELEMETRY_BUFFER_SIZE", "0")
    with pytest.raises(ValueError, match="NIXL_TELEMETRY_BUFFER_SIZE"):
        agent("t")
    monkeypatch.delenv("NIXL_TELEMETRY_BUFFER_SIZE")
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "maybe")
    with pytest.raises(ValueError, match="maybe"):
        agent("t")


def events_of(path):
    data = path.read_bytes()
    write, read, version, expected, capacity, mask = struct.unpack_from("<QQiiQQ", data)
    assert (version, expected, mask) == (4, 4, capacity - 1) and len(data) == 40 + 16 * capacity
    return capacity, [struct.unpack_from("<IIQ", data, 40 + 16 * (i & mask))[::2] for i in range(read, write)]


def test_ring_file(monkeypatch, tmp_path):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_DIR", str(tmp_path))
    monkeypatch.setenv("NIXL_TELEMETRY_BUFFER_SIZE", "100")
    one = agent("ringed", backend_params={"LOOPBACK": {"fail_nth": "3"}})
    memory, h = run_one(one)
    one.transfer(h)
    memory2, h2 = run_one(one, "READ", 32, 1)
    one.transfer(h2)
    with pytest.raises(nixl.nixlBackendError):
        one.transfer(h2)
    one.deregister_memory([memory2])
    capacity, events = events_of(tmp_path / "ringed")
    assert capacity == 128
    kinds = [kind for kind, _ in events]
    assert kinds == [4, 7, 6, 0, 2, 4, 7, 6, 1, 3, 10, 5]
    assert events[0][1] == 256 and events[3][1] == 128 and events[4][1] == 1 and events[8][1] == 32 and events[11][1] == 64
    for _ in range(200):
        one.transfer(h)
    assert len(events_of(tmp_path / "ringed")[1]) <= 128


def test_prometheus(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "prometheus")
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_PORT", str(port))
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_LOCAL", "y")
    one = agent("scraped")
    memory, h = run_one(one)
    for _ in range(3):
        one.transfer(h)
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if not line.startswith("#")}
    mine = '{agent_name="scraped"}'
    assert values["agent_tx_bytes_total" + mine] == 384 and values["agent_tx_requests_num_total" + mine] == 3
    assert values["agent_tx_last_bytes" + mine] == 128 and values["agent_rx_bytes_total" + mine] == 0
    assert values["agent_memory_registered_total" + mine] == 256 and values["agent_xfer_time_us_count" + mine] == 3
    assert values['agent_errors_total{agent_name="scraped",status="BACKEND"}'] == 0
    other = agent("also")  # the port is busy: a warning, no error
    assert other.name == "also"
    del one, h, other
    gc.collect()
