"""TensorRT-LLM: the chain of imports, lists that are made again to deregister, and states that are PROC or DONE and nothing else."""
import importlib

import numpy as np
from agents import until
from peer import Peer

SIZE = 1 << 16


def imported():
    for name in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("none of the three names")


def context(channel):
    """The context side: writes its cache into the blocks that the generation side told of."""
    package = imported()
    one = package.nixl_agent("context", package.nixl_agent_config(backends=["UCX"]))
    memory = np.arange(SIZE, dtype=np.uint8)
    rows = [(memory.ctypes.data, SIZE, 0, "")]
    descs = one.get_reg_descs(rows, "DRAM")
    assert descs is not None
    one.register_memory(descs)
    metadata, address = channel.recv()
    name = one.add_remote_agent(metadata).decode()
    h = one.initialize_xfer("WRITE", one.get_xfer_descs([rows[0][:3]], "DRAM"), one.get_xfer_descs([(address, SIZE, 0)], "DRAM"), name)
    assert isinstance(h, package.nixl_xfer_handle)
    states = [one.transfer(h)]
    while states[-1] != "DONE":
        states.append(one.check_xfer_state(h))
    one.send_notif(name, b"sync")
    one.release_xfer_handle(h)
    one.deregister_memory(one.get_reg_descs(rows, "DRAM"))
    channel.send(sorted(set(states) - {"PROC", "DONE"}))
    channel.recv()


def test_context_writes_to_generation():
    package = imported()
    with Peer(context) as other:
        one = package.nixl_agent("generation", package.nixl_agent_config(backends=["UCX"]))
        memory = np.zeros(SIZE, np.uint8)
        rows = [(memory.ctypes.data, SIZE, 0, "")]
        one.register_memory(one.get_reg_descs(rows, "DRAM"))
        other.send((one.get_agent_metadata(), memory.ctypes.data))
        assert other.receive() == []
        assert until(lambda: one.get_new_notifs()) == {"context": [b"sync"]}
        assert (memory == np.arange(SIZE, dtype=np.uint8)).all()
        one.deregister_memory(one.get_reg_descs(rows, "DRAM"))
        other.send("stop")
