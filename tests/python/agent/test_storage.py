"""Storage through the agent on POSIX: query_memory, file forms, the guide's checkpoint (12.1, 16.3, 16.5, 16.7)."""
import os

import nixl
import numpy as np
import pytest
from agents import agent, done


@pytest.fixture
def one():
    return agent("storage", "POSIX")


def move(one, op, memory, descs, notif=b""):
    h = one.initialize_xfer(op, one.get_xfer_descs([memory]), descs.trim(), "storage", notif)
    one.transfer(h)
    done(one, h)
    return h


@pytest.mark.parametrize("form", ["fd", "guide", "path", "direct"])
def test_round_trip(one, tmp_path, form):
    path, size = tmp_path / "file", 64 << 10
    flags = os.O_RDWR | os.O_CREAT
    if form == "direct":
        try:
            fd = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            pytest.skip(f"O_DIRECT: {error}")
    else:
        fd = os.open(path, flags)
    meta = {"fd": "", "direct": "", "guide": str(path).encode(), "path": f"rw:{path}"}[form]
    dev = 77_000 if form == "path" else fd
    regs = one.get_reg_descs([(0, size, dev, meta)], "FILE")
    memory = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    one.register_memory([memory]), one.register_memory(regs)
    h = move(one, "WRITE", memory, regs, b"saved")
    assert one.query_xfer_backend(h) == "POSIX" and one.get_new_notifs() == {"storage": [b"saved"]}
    assert path.read_bytes() == memory.tobytes()
    copy = memory.copy()
    memory[:] = 0
    move(one, "READ", memory, regs)
    assert (memory == copy).all()
    one.deregister_memory(regs)
    os.close(fd)


def test_query(one, tmp_path):
    (tmp_path / "there").write_bytes(b"12345")
    query = lambda *paths: one.query_memory([(0, 0, 0, str(p)) for p in paths], "POSIX", mem_type="FILE")
    first, absent, empty = query(tmp_path / "there", tmp_path / "absent", "")
    assert first["size"] == "5" and {"mode", "mtime"} <= set(first) and absent is None and empty is None
    assert one.query_memory([], "POSIX", mem_type="FILE") == []
    with pytest.raises(ValueError):
        one.query_memory([(0, 0, 0, "x")], "GDS", mem_type="FILE")
    memory_only = agent("m")
    with pytest.raises(nixl.nixlNotSupportedError):
        memory_only.query_memory([(0, 0, 0, "x")], "LOOPBACK", mem_type="FILE")


def test_checkpoint_of_the_guide(one, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(31, 17), torch.nn.Linear(17, 3))
    params = one.register_memory([p.data for p in model.parameters()])
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    path = tmp_path / "checkpoint.pt"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    file = one.get_reg_descs([(0, total, fd, str(path).encode())], "FILE")
    one.register_memory(file)
    h = one.initialize_xfer("WRITE", params, file, "storage", b"save")
    one.transfer(h)
    done(one, h)
    assert one.check_remote_xfer_done("storage", b"save")
    expected = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    assert path.read_bytes() == expected
    for p in model.parameters():
        p.data.zero_()
    back = one.initialize_xfer("READ", params, file, "storage")
    one.transfer(back)
    done(one, back)
    assert b"".join(p.detach().numpy().tobytes() for p in model.parameters()) == expected
    os.close(fd)


def test_refusals(one, tmp_path):
    memory = np.zeros(4096, np.uint8)
    one.register_memory([memory])
    with pytest.raises(nixl.nixlInvalidParamError):
        one.register_memory(one.get_reg_descs([(0, 10, 999_999, "")], "FILE"))
    with pytest.raises(nixl.nixlBackendError, match="No such file"):
        one.register_memory(one.get_reg_descs([(0, 10, 5, "ro:/nonexistent/file")], "FILE"))
    path = f"rw,create:{tmp_path / 'p'}"
    regs = one.register_memory(one.get_reg_descs([(0, 4096, 70_001, path)], "FILE"))
    with pytest.raises(nixl.nixlInvalidParamError):
        one.register_memory(one.get_reg_descs([(0, 4096, 70_001, f"rw,create:{tmp_path / 'q'}")], "FILE"))
    one.deregister_memory(regs)
    one.register_memory(one.get_reg_descs([(0, 4096, 70_001, f"rw,create:{tmp_path / 'q'}")], "FILE"))


def test_sides_that_storage_never_has(one, tmp_path):
    """BK-4: wrong kinds, and a peer that is not the agent itself, are wrong arguments and not something that might be found."""
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    memory = np.zeros(4096, np.uint8)
    one.register_memory([memory])
    one.register_memory([(0, 4096, fd, "")], "FILE")
    dram, file = one.get_xfer_descs([memory]), one.get_xfer_descs([(0, 4096, fd)], "FILE")
    for local, remote in ((file, dram), (dram, dram), (file, file)):
        with pytest.raises(nixl.nixlInvalidParamError, match="POSIX"):
            one.initialize_xfer("WRITE", local, remote, "storage")
    with pytest.raises(nixl.nixlInvalidParamError, match="POSIX"):
        one.prep_xfer_dlist("storage", dram)
    with pytest.raises(nixl.nixlNotFoundError):  # the right kind, but nothing registered there
        one.initialize_xfer("WRITE", dram, one.get_xfer_descs([(0, 4096, fd + 1)], "FILE"), "storage")
    with pytest.raises(nixl.nixlNotFoundError):
        one.initialize_xfer("WRITE", dram, file, "nobody")
    one.create_backend("LOOPBACK")
    peer = agent("peer")
    one.add_remote_agent(peer.get_agent_metadata())
    with pytest.raises(nixl.nixlInvalidParamError, match="POSIX.*peer"):
        one.initialize_xfer("WRITE", dram, file, "peer")
    with pytest.raises(nixl.nixlInvalidParamError, match="POSIX.*peer"):
        one.prep_xfer_dlist("peer", file)
    os.close(fd)


def test_raw_tuples_as_pages(one, tmp_path):
    pages, page = 16, 4096
    fd = os.open(tmp_path / "pages", os.O_RDWR | os.O_CREAT)
    block = np.random.default_rng(2).integers(0, 256, pages * page, np.uint8)
    one.register_memory([block])
    one.register_memory([(0, pages * page, fd, "")], "FILE")
    local = one.prep_xfer_dlist("", [(block.ctypes.data + i * page, page, 0) for i in range(pages)], mem_type="DRAM")
    remote = one.prep_xfer_dlist("storage", [(i * page, page, fd) for i in range(pages)], mem_type="FILE")
    order = np.random.default_rng(3).permutation(pages)
    h = one.make_prepped_xfer("WRITE", local, order, remote, np.arange(pages))
    one.transfer(h)
    done(one, h)
    assert (tmp_path / "pages").read_bytes() == block.reshape(pages, page)[order].tobytes()
    os.close(fd)
