"""POSIX through the Python package: descriptors, engines, the checkpoint flow, and faults made by the real kernel."""

import os
import subprocess

import numpy
import pytest

nixl = pytest.importorskip("nixl")

TIMEOUT = 60
ENGINES = {"automatic": {}, "libaio": {"use_aio": "true"}, "io_uring": {"use_uring": "true"}, "posix_aio": {"use_posix_aio": "1"}}


@pytest.fixture(params=ENGINES)
def agent(request):
    return make_agent(**ENGINES[request.param])


def make_agent(**params):
    agent = nixl.nixl_agent("posix", nixl.nixl_agent_config(backends=[]))
    agent.create_backend("POSIX", params)
    return agent


def pattern(size, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, size, dtype=numpy.uint8)


def request(agent, operation, array, dev, meta="", offset=0):
    agent.register_memory([array])
    agent.register_memory([(0, 0, dev, meta)], "FILE")
    return agent.initialize_xfer(operation, agent.get_xfer_descs([array]),
                                 agent.get_xfer_descs([(offset, array.nbytes, dev)], "FILE"), agent.name)


def run(agent, handle):
    if agent.transfer(handle) != "DONE":
        assert handle.wait(TIMEOUT) == "DONE"


@pytest.mark.parametrize("form", ["fd", "guide", "path", "path,direct", "O_DIRECT fd"])
@pytest.mark.parametrize("size, offset", [(1, 0), (4096, 4096), (1_000_001, 4097)])
def test_round_trip(agent, tmp_path, form, size, offset):
    path = tmp_path / "file"
    path.touch()
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if form.startswith("O_DIRECT") else 0))
    dev, meta = {"guide": (fd, str(path)), "path": (77, f"rw:{path}"), "path,direct": (77, f"rw,direct:{path}")}.get(form, (fd, ""))
    out, back = pattern(size), numpy.zeros(size, numpy.uint8)
    run(agent, request(agent, "WRITE", out, dev, meta, offset))
    assert path.read_bytes()[offset:] == out.tobytes()
    other = 78 if dev == 77 else dev
    run(agent, request(agent, "READ", back, other, meta, offset))
    assert numpy.array_equal(out, back)
    os.close(fd)


def test_transfer_names_its_path(tmp_path):
    for engine, queue in (("libaio", "libaio"), ("io_uring", "io_uring"), ("posix_aio", "posix_aio"), ("automatic", "threads")):
        agent = make_agent(**ENGINES[engine])
        handle = request(agent, "WRITE", pattern(10), 1, f"rw,create:{tmp_path}/{engine}")
        assert agent.query_xfer_backend(handle) == "POSIX" and agent.query_xfer_path(handle) == queue


def test_disk_full_fails_the_request_and_no_other(agent, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted")
    try:
        big = pattern(4 << 20)
        full = request(agent, "WRITE", big, 1, f"rw,create:{small}/full")
        fine = request(agent, "WRITE", big, 2, f"rw,create:{tmp_path}/fine")
        agent.transfer(full)
        agent.transfer(fine)
        with pytest.raises(nixl.nixlBackendError, match=r"write of \d+ bytes at offset \d+ of .*/full: No space left on device \(ENOSPC, 28\)"):
            full.wait(TIMEOUT)
        with pytest.raises(nixl.nixlBackendError, match="ENOSPC"):  # the answer does not change
            agent.check_xfer_state(full)
        assert fine.wait(TIMEOUT) == "DONE"
        assert (tmp_path / "fine").read_bytes() == big.tobytes()
    finally:
        del agent, full, fine
        subprocess.run(["umount", "-l", small], check=True)


def test_device_error(tmp_path):
    """A loop device over a file on a full tmpfs: the kernel answers EIO to what it cannot store."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted")
    device = None
    try:
        with open(small / "disk", "wb") as f:
            f.truncate(8 << 20)
        made = subprocess.run(["losetup", "--show", "-f", small / "disk"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr.strip()}")
        device = made.stdout.strip()
        for params in ENGINES.values():
            agent = make_agent(**params)
            handle = request(agent, "WRITE", pattern(4 << 20), 1, f"rw,direct:{device}")
            with pytest.raises(nixl.nixlBackendError, match=r"of /dev/loop\d+: .*(EIO, 5|ENOSPC, 28)"):
                run(agent, handle)
            del agent, handle
    finally:
        if device:
            subprocess.run(["losetup", "-d", device])
        subprocess.run(["umount", "-l", small])


def test_file_truncated_under_the_read(agent, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(1 << 20))
    back = numpy.zeros(1 << 20, numpy.uint8)
    handle = request(agent, "READ", back, 1, f"rw:{path}")
    run(agent, handle)
    os.truncate(path, 70_000)
    with pytest.raises(nixl.nixlBackendError, match="the file ends at offset 70000"):
        run(agent, handle)
    path.write_bytes(bytes(1 << 20))
    run(agent, handle)


def test_descriptor_closed_by_the_caller(agent, tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    data = pattern(1 << 20)
    handle = request(agent, "WRITE", data, fd)
    run(agent, handle)
    os.close(fd)
    with pytest.raises(nixl.nixlBackendError, match=f"fd {fd}.* was closed after it was registered.*EBADF"):
        agent.transfer(handle)
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    assert other == fd  # the number now means another file, which must stay as it is
    with pytest.raises(nixl.nixlBackendError, match="another file"):
        agent.transfer(handle)
    assert (tmp_path / "other").stat().st_size == 0
    os.close(other)


def test_file_removed(agent, tmp_path):
    """An open file lives on without its name: transfers go on, and the name stays free for another file."""
    path = tmp_path / "f"
    data, back = pattern(300_000), numpy.zeros(300_000, numpy.uint8)
    write = request(agent, "WRITE", data, 1, f"rw,create:{path}")
    run(agent, write)
    path.unlink()
    path.write_bytes(b"another")
    run(agent, write)
    agent.register_memory([back])
    run(agent, agent.initialize_xfer("READ", agent.get_xfer_descs([back]), agent.get_xfer_descs([(0, back.nbytes, 1)], "FILE"), agent.name))
    assert numpy.array_equal(data, back) and path.read_bytes() == b"another"


def test_read_only_descriptor(agent, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    with pytest.raises(nixl.nixlInvalidParamError, match="open for reading only"):
        request(agent, "WRITE", pattern(10), 1, f"ro:{path}")


def test_release_in_flight(agent, tmp_path):
    data = pattern(64 << 20)
    for _ in range(5):
        handle = request(agent, "WRITE", data, 1, f"rw,create:{tmp_path}/f")
        agent.transfer(handle)
        agent.cancel_xfer(handle)
        try:
            handle.wait(TIMEOUT)
        except nixl.nixlCancelledError:
            pass
        handle.release()
        agent.deregister_memory(agent.get_reg_descs([(0, 0, 1, "")], "FILE"))


def test_registration_errors(agent, tmp_path):
    path = tmp_path / "f"
    path.touch()
    agent.register_memory([(0, 0, 5, f"rw:{path}")], "FILE")
    with pytest.raises(nixl.nixlInvalidParamError, match="id 5 is in use"):
        agent.register_memory([(0, 0, 5, f"rw:{path}2")], "FILE")
    with pytest.raises(nixl.nixlInvalidParamError, match="unknown flag"):
        agent.register_memory([(0, 0, 6, f"rw,fast:{path}")], "FILE")
    with pytest.raises(nixl.nixlInvalidParamError, match="not open"):
        agent.register_memory([(0, 0, 98765, "")], "FILE")
    with pytest.raises(nixl.nixlBackendError, match="ENOENT"):
        agent.register_memory([(0, 0, 7, f"ro:{tmp_path}/none")], "FILE")


def test_query_memory(tmp_path):
    agent = make_agent()
    path = tmp_path / "f"
    path.write_bytes(bytes(123))
    found, missing, again, empty = agent.query_memory([(0, 0, 0, str(p)) for p in (path, tmp_path / "no", path, "")], "POSIX", "FILE")
    assert missing is None and empty is None and found == again and found["size"] == "123" and set(found) == {"size", "mode", "mtime"}


def test_checkpoint_flow_of_many_tensors_to_one_file(tmp_path):
    """Counts differ and one side is a single descriptor of the whole size: it is split in order; the payload comes to ourselves."""
    agent = make_agent()
    tensors = [pattern(size, size) for size in (1000, 1, 300_000, 77)]
    total = sum(t.nbytes for t in tensors)
    path = tmp_path / "ckpt"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    memory = agent.register_memory(tensors)
    file = agent.get_reg_descs([(0, total, fd, str(path).encode())], "FILE")
    agent.register_memory(file)
    handle = agent.initialize_xfer("WRITE", memory, file, "posix", b"save")
    run(agent, handle)
    assert path.read_bytes() == b"".join(t.tobytes() for t in tensors)
    assert agent.check_remote_xfer_done("posix", b"save")
    os.close(fd)


def test_parameters():
    for params in ({"use_uring": "true", "use_aio": "true"}, {"kernel_queue_size": "deep"}):
        with pytest.raises(nixl.nixlBackendError, match=next(iter(params))):
            make_agent(**params)
    assert make_agent().get_plugin_params("POSIX") == {}
