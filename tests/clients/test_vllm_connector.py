"""vLLM's connector: prepped lists, integer arrays, bytes names, three threads, heartbeats, strided tables with fallback."""
import threading
import time
import uuid

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config
from nixl._bindings import nixlXferTelemetry
from peer import Peer

BLOCKS, BLOCK = 100_000, 64


def prefill(channel):
    agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(num_threads=2, capture_telemetry=True))
    cache = (np.arange(BLOCKS * BLOCK) // BLOCK % 251).astype(np.uint8)
    descs = agent.get_reg_descs([(cache.ctypes.data, cache.nbytes, 0, "")], "DRAM")
    agent.register_memory(descs, backends=["UCX"])
    channel.send((agent.get_agent_metadata(), agent.name, cache.ctypes.data))
    seen = []
    while len(seen) < 4:
        for messages in agent.get_new_notifs().values():
            seen += messages
    channel.send(seen)
    channel.recv()


def test_pull_of_blocks():
    with Peer(prefill) as other:
        agent = nixl_agent(str(uuid.uuid4()), nixl_agent_config(backends=["UCX"], capture_telemetry=True))
        cache = np.zeros(BLOCKS * BLOCK, np.uint8)
        agent.register_memory(agent.get_reg_descs([(cache.ctypes.data, cache.nbytes, 0, "")], "DRAM"), backends=["UCX"])
        metadata, name, far = other.receive()
        names = []
        thread = threading.Thread(target=lambda: names.append(agent.add_remote_agent(metadata)))
        thread.start()
        thread.join()
        remote_name = names[0]
        assert remote_name == name.encode()

        table = np.empty((BLOCKS, 3), np.uint64)
        table[:, 0] = cache.ctypes.data + np.arange(BLOCKS, dtype=np.uint64) * BLOCK
        table[:, 1:] = (BLOCK, 0)
        local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", agent.get_xfer_descs(table, "DRAM"))
        try:
            remote = agent.prep_xfer_dlist(remote_name, np.array([(far, BLOCK, 0, BLOCK, BLOCKS)], np.uint64), "DRAM")
        except (ValueError, TypeError):  # the client's fallback for older releases
            table[:, 0] += far - cache.ctypes.data
            remote = agent.prep_xfer_dlist(remote_name, agent.get_xfer_descs(table, "DRAM"))

        order = np.random.default_rng(1).permutation(BLOCKS)
        quarters = np.array_split(order, 4)
        errors = []

        def request(i):
            try:
                h = agent.make_prepped_xfer("READ", local, quarters[i], remote, quarters[i], notif_msg=f"req:{i}".encode())
                agent.transfer(h)
                while agent.check_xfer_state(h) != "DONE":
                    time.sleep(0.0005)
                telemetry = agent.get_xfer_telemetry(h)
                assert isinstance(telemetry, nixlXferTelemetry) and telemetry.xferDuration >= 1
                assert telemetry.totalBytes == len(quarters[i]) * BLOCK
                agent.release_xfer_handle(h)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=request, args=(i,)) for i in range(3)]
        [t.start() for t in threads]
        request(3)
        [t.join() for t in threads]
        assert not errors
        assert sorted(other.receive()) == [b"req:0", b"req:1", b"req:2", b"req:3"]
        assert (cache == (np.arange(BLOCKS * BLOCK) // BLOCK % 251)).all()
        agent.send_notif(remote_name, b"heartbeat")
        agent.release_dlist_handle(local), agent.release_dlist_handle(remote)
        agent.remove_remote_agent(remote_name)
        other.send("stop")
