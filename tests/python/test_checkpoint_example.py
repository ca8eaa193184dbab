"""examples/python/checkpoint.py as a user runs it: files, objects, and a kill in the middle."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

pytest.importorskip("nixl")
pytest.importorskip("torch")
ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "python" / "checkpoint.py"


def command(*arguments):
    return [sys.executable, str(SCRIPT), "--size", "128MB", "--shards", "4", *map(str, arguments)]


def run(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(180)
def test_killed_and_resumed(tmp_path):
    process = subprocess.Popen(command("--folder", tmp_path), stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()  # the first shard is complete
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "shard-000.bin: " in first and "GB/s" in first
    assert not (tmp_path / "shard-003.bin.json").exists()
    out = run("--folder", tmp_path)
    assert "save " + str(tmp_path / "shard-000.bin") + ": complete already" in out
    assert "shard-003.bin: 34 MB" in out and "every byte is right" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"shard-00{i}.bin{s}" for i in range(4) for s in ("", ".json"))


@pytest.mark.timeout(180)
def test_objects():
    pytest.importorskip("moto", reason="moto is not installed: no S3 server to test against")
    from object_servers import S3Server

    with S3Server() as server:
        arguments = ("--backend", "OBJ", "--params", json.dumps(server.params()), "--folder", "ck")
        out = run(*arguments)
        assert "every byte is right" in out and "(OBJ, http+s3)" in out
        assert run(*arguments).count("complete already") == 4


def test_usage():
    assert subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True).returncode == 0
    assert subprocess.run([sys.executable, str(SCRIPT), "--size", "big"], capture_output=True, env=os.environ).returncode == 2
