"""LMCache: the channel (pickled descriptors, writes without notification, 1 ms polling) and the storage backend."""
import os
import pickle
import time

import nixl._bindings as nixlBind
import numpy as np
import pytest
from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t
from peer import Peer

PAGES, PAGE = 256, 1024


def receiver(channel):
    agent = nixl_agent("receiver", nixl_agent_config(backends=["UCX"]))
    memory = np.zeros(PAGES * PAGE, np.uint8)
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], mem_type="cpu")
    descs = agent.get_xfer_descs([(memory.ctypes.data + i * PAGE, PAGE, 0) for i in range(PAGES)], mem_type="cpu")
    channel.send((agent.get_agent_metadata(), pickle.dumps(descs)))
    agent.add_remote_agent(channel.recv())  # second stage of the handshake
    channel.recv()
    channel.send(memory.tobytes())


def test_channel():
    with Peer(receiver) as other:
        agent = nixl_agent("sender", nixl_agent_config(backends=["UCX"]))
        memory = np.random.default_rng(1).integers(0, 256, PAGES * PAGE, np.uint8)
        agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], mem_type="cpu")
        metadata, packed = other.receive()
        name = agent.add_remote_agent(metadata)
        other.send(agent.get_agent_metadata())
        local = agent.prep_xfer_dlist("", [(memory.ctypes.data + i * PAGE, PAGE, 0) for i in range(PAGES)], mem_type="cpu")
        remote = agent.prep_xfer_dlist(name.decode(), pickle.loads(packed), mem_type="cpu")
        h = agent.make_prepped_xfer("WRITE", local, list(range(PAGES)), remote, list(range(PAGES)))
        agent.transfer(h)
        while agent.check_xfer_state(h) != "DONE":
            time.sleep(0.001)
        other.send("look")
        assert other.receive() == memory.tobytes()


def test_storage(tmp_path):
    mode = nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
    agent = nixl_agent("store", nixl_agent_config(backends=["POSIX"], sync_mode=mode))
    memory = np.random.default_rng(2).integers(0, 256, 8 * PAGE, np.uint8)
    regs: nixlBind.nixlRegDList = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], mem_type="DRAM")
    fds = [os.open(tmp_path / f"{i}", os.O_RDWR | os.O_CREAT) for i in range(8)]
    files = agent.register_memory([(0, PAGE, fd, "") for fd in fds], mem_type="FILE")
    local = agent.prep_xfer_dlist("", [(memory.ctypes.data + i * PAGE, PAGE, 0) for i in range(8)], mem_type="DRAM")
    remote = agent.prep_xfer_dlist("store", [(0, PAGE, fd) for fd in fds], mem_type="FILE")
    h = agent.make_prepped_xfer("WRITE", local, list(range(8)), remote, list(range(8)))
    agent.transfer(h)
    while agent.check_xfer_state(h) != "DONE":
        pass
    answers = agent.query_memory([(0, 0, 0, str(tmp_path / name)) for name in ("0", "1", "none", "2")], "POSIX", mem_type="FILE")
    leading = 0
    for answer in answers:
        if answer is None:
            break
        leading += 1
    assert leading == 2
    agent.release_xfer_handle(h)
    agent.deregister_memory(regs)
    agent.deregister_memory(files)
    agent.release_dlist_handle(local), agent.release_dlist_handle(remote)
    assert b"".join((tmp_path / f"{i}").read_bytes() for i in range(8)) == memory.tobytes()
    with pytest.raises(nixlBind.nixlBackendError):
        agent.register_memory([(0, PAGE, 9_999, "ro:/nonexistent")], mem_type="FILE")
    [os.close(fd) for fd in fds]
