"""SGLang: disaggregation (initialize_xfer with room messages) and HiCache (replaced native agent, storage loopback)."""
import json
import os
import threading

import nixl
import nixl._bindings as nixlBind
import numpy as np
import pytest
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer


def decode(channel):
    agent = nixl_agent("decode", nixl_agent_config(backends=[], num_threads=8))
    agent.create_backend("UCX", {})
    memory = np.zeros(1 << 16, np.uint8)
    regs = agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    assert regs
    channel.send((agent.get_agent_metadata(), memory.ctypes.data))
    seen = []
    while len(seen) < 9:
        for messages in agent.get_new_notifs().values():
            seen += [m.decode("ascii") for m in messages]
    channel.send((sorted(seen), memory.tobytes()))
    channel.recv()


def test_disaggregation(monkeypatch):
    monkeypatch.setenv("SGLANG_DISAGGREGATION_NIXL_BACKEND", "UCX")
    monkeypatch.setenv("SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS", json.dumps({"num_workers": "1"}))
    backend = os.environ["SGLANG_DISAGGREGATION_NIXL_BACKEND"]
    with Peer(decode) as other:
        agent = nixl_agent("prefill", nixl_agent_config(backends=[], num_threads=8))
        assert backend in agent.get_plugin_list()
        agent.create_backend(backend, json.loads(os.environ["SGLANG_DISAGGREGATION_NIXL_BACKEND_PARAMS"]))
        memory = np.random.default_rng(1).integers(0, 256, 1 << 16, np.uint8)
        if not agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM"):
            raise AssertionError("falsy registration")
        metadata, far = other.receive()
        agent.add_remote_agent(metadata)
        handles = []  # never released by hand
        for chunk in range(8):
            at = chunk * 8192
            h = agent.initialize_xfer("WRITE", agent.get_xfer_descs([(memory.ctypes.data + at, 8192, 0)], "DRAM"),
                                      agent.get_xfer_descs([(far + at, 8192, 0)], "DRAM"), "decode",
                                      f"7_kv_{chunk}_{int(chunk == 7)}".encode("ascii"))
            agent.transfer(h)
            handles.append(h)
        while not all(agent.check_xfer_state(h) == "DONE" for h in handles):
            pass
        agent.send_notif("decode", b"7_aux")
        messages, contents = other.receive()
        assert messages == sorted([f"7_kv_{i}_{int(i == 7)}" for i in range(8)] + ["7_aux"]) and contents == memory.tobytes()
        other.send("stop")


@pytest.mark.parametrize("direct", [False, True])
def test_hicache(tmp_path, direct):
    agent = nixl_agent("hicache", nixl_agent_config(backends=[]))
    config = nixlBind.nixlAgentConfig()
    config.useProgThread = True
    config.syncMode = nixlBind.NIXL_THREAD_SYNC_RW
    agent.agent = nixlBind.nixlAgent("hicache", config)
    agent.plugin_list = agent.agent.getAvailPlugins()
    backend = next(name for name in ("3FS", "POSIX", "GDS_MT", "GDS", "OBJ") if name in agent.plugin_list)
    assert backend == "POSIX"
    agent.create_backend(backend, {})
    page = 4096
    block = np.frombuffer(memoryview(bytearray(page * 64 + 4096)), np.uint8)
    block = block[(-block.ctypes.data) % 4096:][:page * 64]
    agent.register_memory([(block.ctypes.data, block.nbytes, 0, "")], "DRAM")
    errors = []

    def move(op, first):
        try:
            for i in range(first, 32, 2):
                path = tmp_path / f"key{i}"
                flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
                fd = os.open(path, flags)
                regs = agent.register_memory([(0, page, fd, "")], "FILE")
                memory = agent.get_xfer_descs([(block.ctypes.data + i * page, page, 0)], "DRAM")
                h = agent.initialize_xfer(op, memory, agent.get_xfer_descs([(0, page, fd)], "FILE"), "hicache")
                if agent.transfer(h) != "DONE":
                    while agent.check_xfer_state(h) != "DONE":
                        pass
                agent.release_xfer_handle(h)
                agent.deregister_memory(regs)
                os.close(fd)
        except Exception as error:
            errors.append(error)

    for op in ("WRITE", "READ"):
        if op == "WRITE":
            block[:] = np.random.default_rng(3).integers(0, 256, block.size, np.uint8)
            expected = block.copy()
        else:
            block[:] = 0
        threads = [threading.Thread(target=move, args=(op, first)) for first in (0, 1)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        if direct and errors and "Invalid argument" in str(errors[0]):
            pytest.skip(f"O_DIRECT: {errors[0]}")
        assert not errors
    assert (block[:32 * page] == expected[:32 * page]).all()
    answers = agent.query_memory([(0, 0, 0, str(tmp_path / name)) for name in ("key0", "absent", "key31")], backend, mem_type="FILE")
    assert [answer is not None for answer in answers] == [True, False, True] and nixl.nixlNotFoundError
