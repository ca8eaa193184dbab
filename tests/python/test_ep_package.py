"""The wheel: built, installed into a fresh environment, imported with torch blocked. Long, so only with --all."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEP_LIMIT_S = 1800

PROGRAM = """
    import os, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "torch":
                raise ImportError("torch is blocked")

    sys.meta_path.insert(0, Blocked())
    import nixl_ep, nixl_ep.buffer, nixl_ep.utils, nixl_ep.nixl_ep_cpp
    assert "site-packages" in nixl_ep.__file__, nixl_ep.__file__
    assert len(os.listdir("/proc/self/task")) == 1, "the import started a thread"
    assert not any("libcuda" in line for line in open("/proc/self/maps"))
    buffer = nixl_ep.Buffer(0, explicitly_destroy=True, device="cpu")
    buffer.update_memory_buffers(2, 2, buffer.get_rdma_size_hint(8, 128, 2, 4))
    buffer.connect_ranks([0])
    buffer.barrier()
    buffer.destroy()
    import nixl
    print("good")
"""


@pytest.mark.skipif(os.environ.get("NIXL_TEST_ALL") != "1", reason="builds a wheel (minutes); runs with --all")
@pytest.mark.timeout(2 * STEP_LIMIT_S)
def test_the_wheel_works_where_nothing_else_is(tmp_path):
    def run(*command):
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=STEP_LIMIT_S).stdout

    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "env")
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("nixl-*.whl")
    run(python, "-m", "pip", "install", wheel)
    assert run(python, "-I", "-c", textwrap.dedent(PROGRAM)).strip() == "good"
