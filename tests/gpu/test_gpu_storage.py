"""Memory of the GPU to files, volumes and objects and back, every byte compared; the path of each is printed.

GDS and GDS_MT go through cuFile, or say "staged" where cuFile or its driver cannot; the others always go through pinned host
memory.
"""

import contextlib
import pathlib
import sys

import pytest

nixl = pytest.importorskip("nixl")
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]

from object_servers import S3Server  # noqa: E402
from utils.benchmark_base import Skip  # noqa: E402
from utils.memory import first_difference, make_buffer, pattern  # noqa: E402

ROOM = 64 << 20


@contextlib.contextmanager
def target(backend, path):
    """(parameters of the backend, kind, registration) of somewhere to write to."""
    if backend == "GUSLI":
        path.write_bytes(bytes(ROOM))
        yield {"config_file": f"version=1\n1 F W N {path} sec=0x3\n"}, "BLK", (0, ROOM, 1, "")
    elif backend == "OBJ":
        pytest.importorskip("moto", reason="moto is not installed: no S3 server to test against")
        with S3Server() as server:
            yield server.params(), "OBJ", (0, 0, 1, "object")
    else:
        yield {}, "FILE", (0, 0, 1, f"rw,create:{path}")


@pytest.mark.parametrize("backend", ["GDS", "GDS_MT", "POSIX", "GUSLI", "OBJ"])
@pytest.mark.parametrize("size, pieces", [(4096, 1), (1_000_001, 1), (64 << 20, 1), (64 << 20, 128), (16 << 20, 4096)])
def test_from_gpu_and_back(tmp_path, backend, size, pieces):
    about = nixl.plugin_report()[backend]
    if not about["available"]:
        pytest.skip(f"{backend}: {about['reason']}")
    try:
        out, back = make_buffer("VRAM", size, 0, False), make_buffer("VRAM", size, 0, False)
    except Skip as reason:
        pytest.skip(str(reason))
    with target(backend, tmp_path / "f") as (params, kind, registration):
        agent = nixl.nixl_agent("gpu", nixl.nixl_agent_config(backends=[]))
        agent.create_backend(backend, params)
        out.write(pattern(size, 1, 0))
        back.write(pattern(size, 2, 0))
        agent.register_memory([(b.address, size, 0, "") for b in (out, back)], "VRAM")
        agent.register_memory([registration], kind)
        step = size // pieces
        for operation, buffer in (("WRITE", out), ("READ", back)):
            near = [(buffer.address + i * step, step, 0) for i in range(pieces)]
            far = [(i * step, step, 1) for i in range(pieces)]
            handle = agent.initialize_xfer(operation, agent.get_xfer_descs(near, "VRAM"), agent.get_xfer_descs(far, kind), "gpu")
            path = agent.query_xfer_path(handle)
            print(f"{backend} {operation} {pieces} x {step}: {path}")
            assert "staged" in path or ("cufile" in path and backend.startswith("GDS")), path
            if agent.transfer(handle) != "DONE":
                assert handle.wait(60) == "DONE"
        assert first_difference(back.read(), pattern(size, 1, 0)) is None
        if kind != "OBJ":
            assert (tmp_path / "f").read_bytes()[:size] == pattern(size, 1, 0).tobytes()


def test_a_gpu_that_is_not_there_is_named(tmp_path):
    try:
        make_buffer("VRAM", 4096, 0, False)
    except Skip as reason:
        pytest.skip(str(reason))
    agent = nixl.nixl_agent("gpu", nixl.nixl_agent_config(backends=[]))
    agent.create_backend("POSIX")
    with pytest.raises(nixl.nixlInvalidParamError, match="GPU 77: this process sees"):
        agent.register_memory([(4096, 4096, 77, "")], "VRAM")
