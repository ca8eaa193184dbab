"""The storage scripts of the benchmark suite, as their users call them."""

import csv
import io
import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("nixl")
ROOT = pathlib.Path(__file__).resolve().parents[2]
POSIX, GDS = "single_node/posix_storage.py", "single_node/gds_storage.py"


def run(script, *arguments, code=0):
    done = subprocess.run([sys.executable, f"benchmarks/{script}", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(200)
@pytest.mark.parametrize("engine, path", [("URING", "io_uring"), ("AIO", "libaio"), ("POSIXAIO", "posix_aio")])
def test_posix_engines(tmp_path, engine, path):
    out = run(POSIX, "--file_path", tmp_path / "f", "--api_type", engine, "--buffer_sizes", "4KB,64KB,1MB", "--iterations", 20)
    assert out.count("PASS") == 3 and f"Transport: {path}" in out and "DRAM -> File" in out
    assert list(tmp_path.iterdir()) == []  # made here, so removed


@pytest.mark.timeout(200)
def test_existing_file_stays_and_is_never_shortened(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(3 << 20))
    report = json.loads(run(POSIX, "--file_path", file, "--operation", "READ", "--buffer_size", "64KB", "--iterations", 10, "--batch_size", 4,
                            "--num_threads", 2, "--pipeline_depth", 2, "--direct_io", "--format", "json"))
    row = report["rows"][0]
    assert row["consistency"] == "PASS" and row["latency_us_p50"] <= row["latency_us_p95"] <= row["latency_us_p99"]
    assert "bypassed" in report["notes"][0] and file.stat().st_size == 3 << 20
    rows = list(csv.DictReader(io.StringIO(run(POSIX, "--file_path", file, "--buffer_sizes", "4KB", "--iterations", 5, "--format", "csv"))))
    assert rows[0]["buffer_size_bytes"] == "4096"


def test_without_the_hardware_it_skips_with_the_reason(tmp_path):
    import nixl

    for name, script, arguments in (("GDS", GDS, ("--buffer_size", "1GB", "--direct_io")),
                                    ("GDS", "storage/gds_benchmark.py", ("--operation", "WRITE", "--buffer_size", "1GB", "--batch_size", 128))):
        about = nixl.plugin_report()[name]
        if about["available"]:
            pytest.skip(f"{name} works here")
        out = run(script, "--file_path", tmp_path / "f", *arguments, code=77)
        assert out.strip() == f"SKIP: {name}: {about['reason']}"


@pytest.mark.timeout(200)
def test_objects(tmp_path):
    pytest.importorskip("moto", reason="moto is not installed: no S3 server to test against")
    from object_servers import S3Server

    with S3Server() as server:
        out = run("storage/obj_s3.py", "--bucket_name", server.bucket, "--region", "us-west-2", "--buffer_sizes", "16KB,1MB", "--num_objects", 5,
                  "--endpoint_override", server.endpoint, "--access_key", "k", "--secret_key", "s")
        assert out.count("PASS") == 4 and "DRAM -> Object" in out
        assert b"nixlbench" not in server.request("GET", f"/{server.bucket}")[1]


@pytest.mark.timeout(200)
def test_blocks(tmp_path):
    arguments = ("--buffer_sizes", "4KB,64KB", "--iterations", 5, "--batch_size", 2)
    out = run("storage/gusli_block.py", "--device_list", f"11:F:{tmp_path}/a,14:F:{tmp_path}/b", "--num_threads", 2, *arguments)
    assert out.count("PASS") == 2 and "DRAM -> Block" in out
    file = tmp_path / "c"
    file.write_bytes(bytes(2 << 20))
    text = f"version=1\n3 F W N {file} sec=0x3\n"
    assert run("storage/gusli_block.py", "--gusli_config_file", text, "--operation", "READ", *arguments).count("PASS") == 2
    assert file.exists()
    run("storage/gusli_block.py", "--device_list", "3:N:t10.0.0.1", *arguments, code=1)


def test_usage(tmp_path):
    run(POSIX, code=2)
    run("storage/gusli_block.py", "--device_list", "11", code=2)
    run("storage/obj_s3.py", code=2)
    run(POSIX, "--file_path", tmp_path / "f", "--api_type", "FAST", code=2)
    run(POSIX, "--file_path", "/nonexistent/f", "--iterations", 1, code=1)
    for script in (POSIX, GDS, "storage/gds_benchmark.py", "storage/obj_s3.py", "storage/gusli_block.py"):
        assert "--buffer_sizes" in run(script, "--help")
