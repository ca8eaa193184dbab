"""GDS and GDS_MT on a GPU: memory of the GPU to a file and back, every byte compared."""

import pathlib
import sys

import pytest

nixl = pytest.importorskip("nixl")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

from utils.benchmark_base import Skip  # noqa: E402
from utils.memory import first_difference, make_buffer, pattern  # noqa: E402


@pytest.mark.parametrize("backend", ["GDS", "GDS_MT"])
@pytest.mark.parametrize("size, pieces", [(4096, 1), (1_000_001, 1), (64 << 20, 1), (64 << 20, 128)])
def test_file_to_gpu_and_back(tmp_path, backend, size, pieces):
    about = nixl.plugin_report()[backend]
    if not about["available"]:
        pytest.skip(f"{backend}: {about['reason']}")
    try:
        out, back = make_buffer("VRAM", size, 0, False), make_buffer("VRAM", size, 0, False)
    except Skip as reason:
        pytest.skip(str(reason))
    agent = nixl.nixl_agent("gds", nixl.nixl_agent_config(backends=[]))
    agent.create_backend(backend)
    out.write(pattern(size, 1, 0))
    back.write(pattern(size, 2, 0))
    agent.register_memory([(b.address, size, 0, "") for b in (out, back)], "VRAM")
    agent.register_memory([(0, 0, 1, f"rw,create:{tmp_path}/f")], "FILE")
    step = size // pieces
    for operation, buffer in (("WRITE", out), ("READ", back)):
        near = [(buffer.address + i * step, step, 0) for i in range(pieces)]
        far = [(i * step, step, 1) for i in range(pieces)]
        handle = agent.initialize_xfer(operation, agent.get_xfer_descs(near, "VRAM"), agent.get_xfer_descs(far, "FILE"), "gds")
        assert "cufile" in agent.query_xfer_path(handle)
        if agent.transfer(handle) != "DONE":
            assert handle.wait(60) == "DONE"
    assert first_difference(back.read(), pattern(size, 1, 0)) is None
    assert (tmp_path / "f").read_bytes() == pattern(size, 1, 0).tobytes()
