"""The transfer half of the benchmark suite: documented command lines, report formats, roles, and runs that must fail."""

import csv
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import pytest
from benchmark_scripts import ROOT, needs_nixl, run, start
from hosts import free_port

from utils import config, metrics

pytestmark = pytest.mark.timeout(120)
FEW = ["--iterations", "20", "--warmup_iter", "2"]


def start_target():
    """A target on a free port: (process, port)."""
    target = start("multi_node/ucx_p2p.py", "--mode", "target", "--ip", "127.0.0.1", "--port", 0, "--announce")
    line = target.stdout.readline()
    if not line.startswith("port "):
        target.kill()
        pytest.fail(f"the target ended: {line}{target.communicate()[1]}")
    return target, line.split()[1]


def parse_table(text):
    """Rows of the first table: (size, gigabytes a second, mean, P95, P99)."""
    lines = text.splitlines()
    at = lines.index("Buffer Size | Bandwidth | Latency (μs) | P95 (μs) | P99 (μs)")
    assert lines[at + 1] == "------------|-----------|--------------|----------|----------"
    rows = []
    for line in lines[at + 2:]:
        if not line:
            break
        size, bandwidth, *times = (cell.strip() for cell in line.split("|"))
        value, unit = bandwidth.split()
        rows.append((config.parse_size(size.replace(" ", "")), float(value) * {"GB/s": 1, "MB/s": 1e-3}[unit], *map(float, times)))
    return rows


@pytest.mark.parametrize("text, size", [("4096", 4096), ("4KB", 4096), ("4K", 4096), ("4KiB", 4096), ("1MB", 1 << 20), ("2g", 2 << 30)])
def test_sizes(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "4XB", "-1", "0", "4 5"])
def test_wrong_sizes(text):
    with pytest.raises(ValueError):
        config.parse_size(text)


def test_percentiles_are_interpolated():
    assert metrics.percentile([1, 2, 3, 4], 50) == 2.5
    assert metrics.percentile([5], 99) == 5
    assert metrics.percentile(list(range(101)), 95) == 95


def test_bandwidth_text():
    assert metrics.format_bandwidth(20.52) == "20.5 GB/s"
    assert metrics.format_bandwidth(1.234) == "1.23 GB/s"
    assert metrics.format_bandwidth(0.05) == "50.0 MB/s"


def test_memory_copy_text_json_csv(tmp_path):
    code, out, _ = run("single_node/memory_copy.py", "--buffer_sizes", "4KB,64KB,1MB", *FEW)
    assert code == 0 and out.startswith("=== NIXL Benchmark Results ===\nBackend: memcpy\nMemory Type: DRAM -> DRAM\nOperation: WRITE\n\n")
    assert [row[0] for row in parse_table(out)] == [4096, 65536, 1 << 20]
    assert out.rstrip().endswith("Transport: memcpy")
    report = tmp_path / "report.json"
    code, out, _ = run("single_node/memory_copy.py", "--buffer_size", "4KB", *FEW, "--format", "json", "--output", report)
    document = json.loads(report.read_text())
    assert code == 0 and set(metrics.ROW_KEYS) == set(document["rows"][0])
    row = document["rows"][0]
    assert row["latency_us_p50"] <= row["latency_us_p95"] <= row["latency_us_p99"]
    size, bandwidth, mean, *_ = parse_table(out)[0]
    assert bandwidth == pytest.approx(row["bandwidth_gbps_decimal"], abs=0.06) and mean == pytest.approx(row["latency_us_mean"], abs=0.06)
    code, out, _ = run("single_node/memory_copy.py", "--buffer_sizes", "4KB,8KB", *FEW, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["buffer_size_bytes"] for row in rows] == ["4096", "8192"] and rows[0]["gpu_percent"] == ""


def test_config_file_and_spellings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('buffer_sizes = ["4KB", "8KB"]\niterations = 7\nwarmup_iter = 1\n')
    code, out, _ = run("single_node/memory_copy.py", "--config-file", path, "--num-iter", "9", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["iterations"] for row in rows] == ["9", "9"] and len(rows) == 2
    path.write_text("no_such_flag = 1\n")
    assert run("single_node/memory_copy.py", "--config_file", path)[0] == 2


@pytest.mark.parametrize("flags", [["--buffer_size", "4XB"], ["--buffer_size", "4KB", "--buffer_sizes", "8KB"], ["--operation", "MOVE"],
                                   ["--memory_type", "TAPE"], ["--no_such_flag"]])
def test_usage_errors(flags):
    assert run("single_node/memory_copy.py", *flags)[0] == 2


@pytest.mark.parametrize("script, flags, text", [
    ("multi_node/all_reduce.py", ["--num_ranks", "1"], "--num_ranks 1; allowed: 2 to 16"),
    ("multi_node/hierarchical.py", ["--scheme", "onetomany", "--num_initiator_dev", "2"], "does not fit 2 initiators"),
    ("multi_node/ucx_p2p.py", ["--mode", "target", "--port", "70000"], "70000 is above the greatest allowed value, 65535"),
    ("multi_node/ucx_p2p.py", ["--tcp_store", "nowhere"], "HOST:PORT is wanted"),
    ("storage/gds_benchmark.py", ["--file_path", "/tmp/none", "--backend", "POSIX", "--buffer_size", "4KB", "--batch_size", "3"],
     "no multiple of --batch_size"),
])
def test_flags_that_do_not_fit(script, flags, text):
    """4.4: what the command line asks for wrongly ends with 2, whoever notices it."""
    code, out, err = run(script, *flags)
    assert code == 2 and text in err


def test_vram_without_gpu_is_skipped_with_a_reason():
    if pathlib.Path("/proc/driver/nvidia/gpus").exists():
        pytest.skip("this machine has a GPU")
    code, out, _ = run("single_node/memory_copy.py", "--memory_type", "VRAM")
    assert code == 77 and re.match(r"SKIP: memcpy: .*CUDA driver", out)


@needs_nixl
class TestWithAgents:
    def test_loopback(self):
        code, out, err = run("single_node/ucx_loopback.py", "--buffer_sizes", "4KB,64KB,1MB", *FEW)
        assert code == 0, err
        rows = parse_table(out)
        assert [row[0] for row in rows] == [4096, 65536, 1 << 20] and all(row[3] <= row[4] for row in rows)
        assert out.count("PASS") == 3 and "FAIL" not in out

    @pytest.mark.parametrize("flags", [
        ["--memory_type", "DRAM", "--buffer_sizes", "4KB,1MB,16MB"],
        ["--operation", "READ", "--batch_size", "8", "--prepared_xfer", "--enable_pt", "--progress_threads", "2", "--verify_data"],
        ["--recreate_xfer", "--pipeline_depth", "4", "--num_threads", "2", "--details"],
        ["--reregister_mem", "--buffer_size", "64KB"],
        ["--gds_batch_pool_size", "256", "--gds_batch_limit", "512", "--storage_enable_direct", "--enable_vmm", "--buffer_size", "4KB"],
    ])
    def test_p2p_on_its_own(self, flags):
        sizes = [] if any("buffer_size" in flag for flag in flags) else ["--buffer_sizes", "4KB,64KB"]
        code, out, err = run("multi_node/ucx_p2p.py", *FEW, *sizes, *flags)
        assert code == 0, err
        assert "DRAM -> DRAM, Remote" in out and "FAIL" not in out
        assert out.rstrip().splitlines()[-1] != "Transport: unknown"

    def test_p2p_by_roles(self):
        target, port = start_target()
        try:
            code, out, err = run("multi_node/ucx_p2p.py", "--mode", "initiator", "--target_ip", "127.0.0.1", "--port", port, *FEW,
                                 "--buffer_sizes", "4KB,1MB")
            assert code == 0, err
            assert len(parse_table(out)) == 2
            assert target.wait(20) == 0
        finally:
            target.kill()
            target.communicate()

    def test_a_killed_target_ends_the_run(self):
        target, port = start_target()
        initiator = None
        try:
            initiator = start("multi_node/ucx_p2p.py", "--mode", "initiator", "--target_ip", "127.0.0.1", "--port", port,
                              "--iterations", "100000000", "--buffer_size", "4KB")
            time.sleep(4)  # into its timed loop; earlier is as good
            assert initiator.poll() is None
            target.kill()
            assert initiator.wait(12) == 1
        finally:
            for process in (target, initiator):
                if process:
                    process.kill()
                    process.communicate()

    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, _, err = run("multi_node/ucx_p2p.py", "--mode", "target", "--port", port)
            assert code == 1 and str(port) in err

    def test_etcd_that_is_not_there(self):
        code, _, err = run("multi_node/ucx_p2p.py", "--etcd_endpoints", f"http://127.0.0.1:{free_port()}", *FEW)
        assert code == 1 and "etcd" in err

    def test_one_wrong_byte_fails_the_run(self, tmp_path):
        """The same script with a target that changes a byte after every transfer that it is asked to check."""
        script = tmp_path / "corrupting.py"
        script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from utils import benchmark_base, lanes, two_sided
answer = lanes.Server.answer
def corrupting(self, request):
    if request["do"] == "check":
        answer(self, {{"do": "corrupt", "offset": 77}})
    return answer(self, request)
lanes.Server.answer = corrupting
sys.exit(benchmark_base.run(two_sided.TwoSided))
""")
        done = subprocess.run([sys.executable, script, *FEW, "--buffer_size", "4KB"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "FAIL (77)" in done.stdout, done.stdout + done.stderr

    @pytest.mark.parametrize("flags", [["--num_ranks", "2"], ["--num_ranks", "3", "--dtype", "bf16"], ["--num_ranks", "3", "--algorithm", "tree"]])
    def test_all_reduce(self, flags):
        code, out, err = run("multi_node/all_reduce.py", *flags, "--iterations", "5", "--warmup_iter", "1", "--buffer_sizes", "4KB,256KB")
        assert code == 0, err
        assert out.count("PASS") == 2 and "Bus bandwidth" in out

    @pytest.mark.parametrize("flags", [
        ["--scheme", "pairwise", "--num_initiator_dev", "2", "--num_target_dev", "2", "--group_size", "1"],
        ["--scheme", "manytoone", "--num_initiator_dev", "3"], ["--scheme", "onetomany", "--num_target_dev", "2"],
        ["--scheme", "tp", "--num_initiator_dev", "2", "--num_target_dev", "3", "--group_size", "1"],
    ])
    def test_hierarchical(self, flags):
        code, out, err = run("multi_node/hierarchical.py", *flags, "--iterations", "5", "--warmup_iter", "1", "--buffer_sizes", "12KB,192KB")
        assert code == 0, err
        assert out.count("PASS") == 2

    def test_gpunetio_is_skipped_with_its_reason(self):
        code, out, err = run("multi_node/gpunetio_p2p.py", "--gpu_devices", "0,1", "--buffer_sizes", "1MB,16MB")
        assert code == 77, err
        import nixl
        assert out == f"SKIP: GPUNETIO: {nixl.plugin_report()['GPUNETIO']['reason']}\n"
        assert "libdoca_gpunetio.so: cannot open" in out or "data path" in out

    @pytest.mark.skipif(not os.environ.get("NIXL_TEST_ALL"), reason="speed is judged only by ./run test --all, on a quiet machine")
    def test_loopback_is_at_least_half_as_fast_as_memcpy(self):
        """The better of three tries: other programs on the machine slow either side at random."""
        def p50(script):
            code, out, err = run(script, "--buffer_size", "64MB", "--iterations", "20", "--warmup_iter", "2", "--format", "csv")
            assert code == 0, err
            return float(next(csv.DictReader(io.StringIO(out)))["latency_us_p50"])

        shares = []
        while len(shares) < 3 and max(shares, default=0) < 0.5:
            shares.append(p50("single_node/memory_copy.py") / p50("single_node/ucx_loopback.py"))
        assert max(shares) >= 0.5, shares

    def test_bench_local_reports_its_musts(self, tmp_path):
        report = tmp_path / "local.json"
        code, out, err = run("bench_local.py", "--memory", "dram", "--only", "idle", "--json", report)
        assert code == 0, out + err
        assert "1 of 1 musts met" in out
        document = json.loads(report.read_text())
        assert [figure["met"] for figure in document["figures"]] == [True]
