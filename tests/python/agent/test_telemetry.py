"""Telemetry (12.3): switches, per-request figures, the ring file, Prometheus."""
import gc
import os
import random
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import nixl
import numpy as np
import pytest
from agents import agent, done, stderr_text, until


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


def test_an_unknown_trace_backend_is_told(monkeypatch, capfd):
    monkeypatch.setenv("NIXL_TRACE_BACKENDS", "nvtx,perfetto")  # what nvtx does: tests/cpp/trace_test.cc
    assert agent("traced").name == "traced"
    assert "NIXL_TRACE_BACKENDS names 'perfetto', which is no trace backend; known: nvtx" in capfd.readouterr().err


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


def test_ring_file_in_strange_hands(monkeypatch, tmp_path):
    """Whoever reads the file may write nonsense into it, or cut it short: events may be lost, nothing else."""
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_DIR", str(tmp_path))
    monkeypatch.setenv("NIXL_TELEMETRY_BUFFER_SIZE", "64")
    one = agent("ringed")
    memory, h = run_one(one)
    points = random.Random(5)
    with stderr_text() as said, open(tmp_path / "ringed", "r+b") as file:
        for _ in range(300):
            file.seek(8 * points.randrange(5))
            file.write(struct.pack("<Q", points.choice([0, 1, 1 << 40, (1 << 64) - 1, points.getrandbits(64)])))
            file.flush()
            one.transfer(h)
            done(one, h)
        file.truncate(0)
        for _ in range(20):
            one.transfer(h)
            done(one, h)
        assert said().count("ringed was cut to 0 bytes, 1064 are needed: no more events are written") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_ring_file_on_a_full_disk(monkeypatch, tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("mounting tmpfs is not allowed here")
    try:
        monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
        monkeypatch.setenv("NIXL_TELEMETRY_DIR", str(tmp_path))
        monkeypatch.setenv("NIXL_TELEMETRY_BUFFER_SIZE", "65536")
        with pytest.raises(RuntimeError, match=r"telemetry file .*ringed of 1048616 bytes: No space left on device \(ENOSPC, 28\)"):
            agent("ringed")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def listening_ports():
    """TCP ports on which this process listens."""
    mine = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if os.path.exists(table):
            rows = [line.split() for line in open(table).read().splitlines()[1:]]
            found |= {int(row[1].rsplit(":", 1)[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}
    return found


def served(name, **config):
    """An agent that serves its telemetry, and on which port: any free one, so that nobody can take it meanwhile."""
    before = listening_ports()
    one = agent(name, **config)
    (port,) = listening_ports() - before
    return one, port


def scrape(port):
    """{line without its value: value}; every metric's lines must stand together under one TYPE line."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    types = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if not line.startswith("#")}


def test_prometheus(monkeypatch):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "prometheus")
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_PORT", "0")
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_LOCAL", "y")
    one, port = served("scraped")
    memory, h = run_one(one)
    for _ in range(3):
        one.transfer(h)
    values = scrape(port)
    mine = '{agent_name="scraped"}'
    assert values["agent_tx_bytes_total" + mine] == 384 and values["agent_tx_requests_num_total" + mine] == 3
    assert values["agent_tx_last_bytes" + mine] == 128 and values["agent_rx_bytes_total" + mine] == 0
    assert values["agent_memory_registered_total" + mine] == 256 and values["agent_xfer_time_us_count" + mine] == 3
    assert values['agent_errors_total{agent_name="scraped",status="BACKEND"}'] == 0
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_PORT", str(port))
    other = agent("also")  # the port is busy: a warning, no error
    assert other.name == "also"
    del one, h, other
    gc.collect()


def test_guests_who_do_not_go_on_hold_up_nobody(monkeypatch):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "prometheus")
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_PORT", "0")
    one, port = served("scraped")
    guests = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for number, guest in enumerate(guests):
        guest.sendall([b"", b"GET /metrics HTTP/1.1\r\n", b"\0" * 3000, b"GET / HTTP/1.1\r\n\r\n"][number % 4])
    start = time.monotonic()
    assert 'agent_tx_bytes_total{agent_name="scraped"}' in scrape(port)
    assert time.monotonic() - start < 9  # a guest's own time is 10 s
    guests[0].sendall(b"x" * 20000)
    guests[0].settimeout(20)
    try:
        assert guests[0].recv(100) == b""  # too long a request
    except ConnectionResetError:
        pass
    for guest in guests:
        guest.close()
    assert one.name == "scraped"


def test_only_enabled_metrics(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_DIR", str(tmp_path))
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLED_METRICS", "agent_tx_*, xfer_time,nothing*")
    one = agent("chosen")
    assert "'nothing*'" in capfd.readouterr().err
    memory, h = run_one(one)
    one.transfer(h)
    assert [kind for kind, _ in events_of(tmp_path / "chosen")[1]] == [6, 0, 2]
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", "prometheus")
    monkeypatch.setenv("NIXL_TELEMETRY_PROMETHEUS_PORT", "0")
    other, port = served("shown")
    values = scrape(port)
    assert 'agent_tx_bytes_total{agent_name="shown"}' in values and 'agent_xfer_time_us_count{agent_name="shown"}' in values
    assert not any("_rx_" in line or "errors" in line or "post_time" in line for line in values)
    del other, one, h


def test_one_prometheus_page_of_many_processes(monkeypatch, tmp_path):
    settings = {"NIXL_TELEMETRY_ENABLE": "y", "NIXL_TELEMETRY_EXPORTER": "prometheus_mp", "NIXL_TELEMETRY_RANK_ENV": "MY_RANK",
                "NIXL_TELEMETRY_MULTIPROC_DIR": str(tmp_path / "pages"), "NIXL_TELEMETRY_PROMETHEUS_PORT": "0",
                "NIXL_TELEMETRY_PROMETHEUS_LOCAL": "y", "NIXL_TELEMETRY_RUN_INTERVAL": "10", "NIXL_TELEMETRY_MP_STALE_TTL": "2"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MY_RANK", "0")
    one, port = served("first")
    memory, h = run_one(one)
    one.transfer(h)
    code = ("import sys; sys.path[:0] = %r; from test_telemetry import *; one = agent('second'); m, h = run_one(one)\n"
            "for _ in range(2): one.transfer(h)\nprint('ready', flush=True); sys.stdin.readline()") % [os.path.dirname(__file__), *sys.path]
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "MY_RANK": "1"})
    try:
        assert any(line.strip() == "ready" for line in child.stdout)
        mine, theirs = ('agent_tx_requests_num_total{agent_name="%s",rank="%d"}' % who for who in (("first", 0), ("second", 1)))
        until(lambda: scrape(port).get(theirs) == 2)
        assert scrape(port)[mine] == 1
        one.transfer(h)
        assert scrape(port)[mine] == 2
        for jump in (-3600, 3600):  # the clock jumps between a process's writing and the scrape
            for page in (tmp_path / "pages").glob(f"{child.pid}-*.prom"):
                os.utime(page, (time.time() + jump, time.time() + jump))
            assert scrape(port)[theirs] == 2
        child.stdin.close()
        assert child.wait(30) == 0
        assert scrape(port)[theirs] == 2  # its last figures can still be read
        until(lambda: theirs not in scrape(port))
        assert scrape(port)[mine] == 2
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("exporter,names", [("prometheus_mp", "NIXL_TELEMETRY_MULTIPROC_DIR"), ("doca", "libdoca_telemetry_exporter.so")])
def test_exporters_say_what_they_need(monkeypatch, exporter, names):
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "y")
    monkeypatch.setenv("NIXL_TELEMETRY_EXPORTER", exporter)
    with pytest.raises(RuntimeError, match=names):
        agent("t")
