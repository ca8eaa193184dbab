"""The command lines of nixlbench and kvbench, the descriptor scripts, and the rendezvous without etcd."""

import csv
import io
import json
import re
import shlex
import socket
import subprocess

import pytest
from benchmark_scripts import needs_nixl, run, start

from utils.kv_models import MODELS, Workload

pytestmark = [pytest.mark.timeout(120), needs_nixl]
FEW = ["--num_iter", "20", "--warmup_iter", "2"]


def rows_of(out):
    """Rows below the headings of nixlbench, as numbers."""
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("Block Size (B)"))
    columns = re.split(r"  +", lines[head])
    rows = []
    for line in lines[head + 1:]:
        if not line[:1].isdigit():
            break
        rows.append(dict(zip(columns, map(float, line.split()), strict=True)))
    return rows


def test_blocks_double_then_batches():
    code, out, err = run("nixlbench.py", "--backend", "UCX", "--start_block_size", "4096", "--max_block_size", "16384",
                         "--max_batch_size", "2", "--check_consistency", *FEW)
    assert code == 0, err
    rows = rows_of(out)
    assert [(row["Block Size (B)"], row["Batch Size"]) for row in rows] == [
        (4096, 1), (4096, 2), (8192, 1), (8192, 2), (16384, 1), (16384, 2)]
    for row in rows:
        assert row["B/W (GB/Sec)"] > 0 and row["P99 Post (us)"] >= row["Avg Post (us)"] / 20
        moved_a_second = row["Block Size (B)"] / row["Avg Lat. (us)"] / 1e3  # GB/s by the other column
        assert moved_a_second == pytest.approx(row["B/W (GB/Sec)"], rel=0.02)


def test_random_places_threads_and_fresh_requests():
    code, out, err = run("nixlbench.py", "--max_block_size", "8KB", "--randomize_location_mode", "bytealigned", "--num_threads", "2",
                         "--recreate_xfer", "--op_type", "READ", *FEW)
    assert code == 0, err
    assert all(row["Avg Prep (us)"] > 0 for row in rows_of(out))


def test_a_row_above_the_total_is_left_out():
    code, out, err = run("nixlbench.py", "--max_block_size", "16KB", "--total_buffer_size", "8KB", *FEW)
    assert code == 0 and len(rows_of(out)) == 2 and "left out" in err


def test_pairs_of_devices_add_up():
    code, out, err = run("nixlbench.py", "--num_initiator_dev", "2", "--num_target_dev", "2", "--start_block_size", "64KB",
                         "--max_block_size", "64KB", *FEW)
    assert code == 0, err
    row, = rows_of(out)
    assert row["Aggregate B/W (GB/Sec)"] == pytest.approx(2 * row["B/W (GB/Sec)"], rel=0.01)


def test_files(tmp_path):
    code, out, err = run("nixlbench.py", "--backend", "POSIX", "--filepath", tmp_path, "--filenames", "a,b", "--max_block_size", "8KB",
                         "--num_threads", "2", *FEW)
    assert code == 0, err
    assert len(rows_of(out)) == 2 and not list(tmp_path.iterdir())  # what was created is gone


@pytest.mark.parametrize("flags", [["--backend", "HF3FS"], ["--worker_type", "nvshmem"], ["--backend", "AZURE_BLOB"]])
def test_what_cannot_run_says_why(flags):
    code, out, _ = run("nixlbench.py", *flags)
    assert code == 77 and re.match(r"SKIP: \w+: .{10,}", out)


def test_the_same_line_twice_without_etcd():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for script, flags in (("multi_node/ucx_p2p.py", ["--tcp_store", f"127.0.0.1:{port}", "--buffer_sizes", "4KB"]),
                          ("nixlbench.py", ["--runtime_type", "ASIO", "--asio_port", port, "--max_block_size", "4KB"])):
        both = [start(script, *flags, *FEW) for _ in range(2)]
        try:
            ends = [process.communicate(timeout=60) for process in both]
        finally:
            for process in both:
                process.kill()
        assert [process.returncode for process in both] == [0, 0], ends
        assert sum("Transport: " in out for out, _ in ends) == 1  # one of them was the target


def test_kvcache_of_the_models():
    code, out, err = run("kvbench.py", "kvcache", "--tp", "2", "--isl", "1000", "--page_size", "64", "--access_pattern", "layer",
                         "--format", "csv")
    assert code == 0, err
    rows = {row["Model"]: row for row in csv.DictReader(io.StringIO(out))}
    assert set(rows) == set(MODELS)
    llama = rows["llama3_1"]
    assert int(llama["IO Size"]) == 64 * 2 * 4 * 128 * 2 and int(llama["Batch Size"]) == 16 * 80
    assert int(rows["deepseek_r1"]["IO Size"]) == 64 * 576 * 2  # latent attention: every rank has all of it


def test_a_block_is_a_page_of_all_layers_of_the_stage():
    layer, block = (Workload(MODELS["gpt_oss"], pp=2, access=access) for access in ("layer", "block"))
    assert block.io_size == 18 * layer.io_size and block.io_size * block.batch_size == layer.io_size * layer.batch_size


def test_plans_run(tmp_path):
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps({"model": {"name": "tiny", "num_layers": 2, "num_kv_heads": 2, "head_dim": 16}}))
    flags = ["--model_config", model, "--isl", "64", "--page_size", "16", "--destination", "file", "--filepath", tmp_path, *FEW]
    code, out, err = run("kvbench.py", "plan", "--format", "json", *flags)
    assert code == 0, err
    line, = json.loads(out)
    done = subprocess.run(shlex.split(line["Command"]), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and rows_of(done.stdout)[0]["Batch Size"] == line["Batch Size"] == 4, done.stderr
    code, out, err = run("kvbench.py", "profile", *flags)
    assert code == 0 and "# tiny: 4 x 4096 bytes" in out, err


def test_traffic_matrices(tmp_path):
    (tmp_path / "m").write_text("0 64K 4K\n1M 0 0\n0 7 0\n")
    (tmp_path / "one.json").write_text(json.dumps({"iters": 5, "traffic_pattern": {"matrix_file": "m", "shards": 3, "mem_type": "cpu"}}))
    code, out, err = run("kvbench.py", "ct-perftest", tmp_path / "one.json", "--print-recv-buffers")
    assert code == 0, err
    head, values = out.splitlines()[-2:]
    assert re.split(r"  +", head) == ["Iters", "Total time (s)", "Avg latency/iter (s)", "Total size (GB)"]
    assert float(values.split()[3]) == pytest.approx(5 * (65536 + 4096 + (1 << 20) + 7) / 1e9, rel=1e-4)
    (tmp_path / "two.json").write_text(json.dumps({"iters": 3, "traffic_patterns": [
        {"matrix_file": "m", "xfer_op": "READ"}, {"matrix_file": "m", "shards": 2}]}))
    report = tmp_path / "report.json"
    code, out, err = run("kvbench.py", "sequential-ct-perftest", tmp_path / "two.json", "--verify-buffers", "--json-output-path", report)
    assert code == 0, err
    rows = json.loads(report.read_text())
    assert [row["Num Senders"] for row in rows] == [3, 3] and all(row["Isolated Latency (ms)"] > 0 for row in rows)
    (tmp_path / "m").write_text("0 1\n")
    code, _, err = run("kvbench.py", "ct-perftest", tmp_path / "one.json")
    assert code == 1 and "square matrix" in err


def test_requests_of_a_million_blocks():
    code, out, err = run("prep_xfer_perf.py", "list")
    assert code == 0 and "make_prepped_xfer, list of 10^6 indices in order" in out, err


def test_plain_calls_are_the_baseline_of_files(tmp_path):
    code, out, err = run("single_node/posix_storage.py", "--file_path", tmp_path / "f", "--baseline", "--buffer_sizes", "4KB", *FEW)
    assert code == 0 and "Transport: pread/pwrite" in out and "PASS" in out, err
