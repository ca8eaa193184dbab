"""Benchmarks of two nodes on two hosts: the far one is a network namespace, and the same-host path may not reach it."""

import base64
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.request

import pytest
from hosts import etcd_server, far_host, free_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks" / "multi_node" / "ucx_p2p.py")
FLAGS = ["--iterations", "20", "--warmup_iter", "2", "--buffer_sizes", "4KB,1MB", "--timeout_s", "60"]

# Network namespaces share a kernel, which UCX's shared memory would find out.
ONLY_NETWORK = {"UCX_TLS": "tcp"}

pytestmark = pytest.mark.timeout(150)
pytest.importorskip("nixl._native", reason="the nixl package is not built")


@pytest.fixture
def host():
    with far_host() as made:
        yield made


class Run:
    def __init__(self, *flags, prefix=(), env={}):
        self.process = subprocess.Popen([*prefix, sys.executable, SCRIPT, *flags, *FLAGS], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env})

    def finish(self):
        try:
            out, err = self.process.communicate(timeout=100)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


def check_table(answer):
    code, out, err = answer
    assert code == 0, out + err
    assert out.count("PASS") == 2 and "FAIL" not in out and ", Remote" in out
    transport = re.search(r"Transport: (.*)", out)[1]
    assert transport.startswith("tcp/") and "cma" not in transport, transport


@pytest.mark.parametrize("operation", ["WRITE", "READ"])
def test_by_roles(host, operation):
    port = str(free_port())
    target = Run("--mode", "target", "--ip", host.far, "--port", port, prefix=host.prefix, env=ONLY_NETWORK)
    initiator = Run("--mode", "initiator", "--target_ip", host.far, "--port", port, "--operation", operation, env=ONLY_NETWORK)
    check_table(initiator.finish())
    code, _, err = target.finish()
    assert code == 0 and "target: served" in err, err


@pytest.mark.parametrize("far", [True, False], ids=["two hosts", "one host"])
def test_by_etcd_with_one_command_line(request, tmp_path, far):
    """Who comes first is the target; nothing stays in etcd."""
    host = request.getfixturevalue("host") if far else None
    with etcd_server(tmp_path, host.near if far else "127.0.0.1") as (endpoint, _):
        flags = ["--etcd_endpoints", endpoint, "--benchmark_group", "test1"]
        env = ONLY_NETWORK if far else {}
        runs = [Run(*flags, prefix=host.prefix if far else (), env=env), Run(*flags, env=env)]
        answers = [run.finish() for run in runs]
        assert [code for code, _, _ in answers] == [0, 0], answers
        target, initiator = sorted(answers, key=lambda answer: "Results" in answer[1])
        assert "target: served" in target[2] and "Results" not in target[1]
        if far:
            check_table(initiator)
        else:
            assert initiator[1].count("PASS") == 2 and "Transport: cma" in initiator[1]
        everything = json.dumps({"key": "AA==", "range_end": "AA==", "count_only": True}).encode()
        with urllib.request.urlopen(endpoint + "/v3/kv/range", everything, timeout=10) as answer:
            assert int(json.load(answer).get("count", 0)) == 0


def test_a_third_of_a_group_is_refused(tmp_path):
    with etcd_server(tmp_path) as (endpoint, _):
        flags = ["--etcd_endpoints", endpoint, "--benchmark_group", "full"]
        for role in ("target", "initiator"):
            key = {"key": base64.b64encode(f"xferbench/full/{role}".encode()).decode(), "value": "c29tZW9uZQ=="}
            urllib.request.urlopen(endpoint + "/v3/kv/put", json.dumps(key).encode(), timeout=10).close()
        code, _, err = Run(*flags).finish()
        assert code == 1 and "both roles taken" in err and "xferbench/full/" in err
