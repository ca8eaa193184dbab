"""The guide's flows as users write them, with real values in the open places (18)."""
import subprocess
import sys
import textwrap

import pytest
from agents import need_backend, until
from nixl._api import nixl_agent, nixl_agent_config

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def ucx():
    need_backend("UCX")


def other(name):
    """A second agent with two tensors registered."""
    one = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    one.tensors = [torch.ones(1024) for _ in range(2)]
    one.register_memory(one.tensors)
    return one


def finish(agent, handle):
    while (state := agent.check_xfer_state(handle)) != "DONE":
        if state == "ERR":
            raise RuntimeError


def test_basic_write():
    peer = other("remote_agent_name")
    a = nixl_agent("my_agent", nixl_agent_config(backends=["UCX"]))
    tensors = [torch.zeros(1024, dtype=torch.float32) for _ in range(2)]
    regs = a.register_memory(tensors)
    peer.add_remote_agent(a.get_agent_metadata())
    a.add_remote_agent(peer.get_agent_metadata())
    h = a.initialize_xfer("WRITE", regs.trim(), peer.get_xfer_descs(peer.tensors), "remote_agent_name", b"transfer_id")
    a.transfer(h)
    finish(a, h)
    a.release_xfer_handle(h)
    a.deregister_memory(regs)
    until(lambda: peer.check_remote_xfer_done("my_agent", b"transfer_id"))
    assert not any(t.any() for t in peer.tensors)


def test_raw_memory():
    import nixl._utils as nixl_utils
    a = nixl_agent("my_agent", nixl_agent_config(backends=["UCX"]))
    addr, target = nixl_utils.malloc_passthru(1024), nixl_utils.malloc_passthru(1024)
    assert addr % 4096 == 0
    nixl_utils.ba_buf(addr, 1024)
    regs = a.get_reg_descs([(addr, 1024, 0), (target, 1024, 0)], "DRAM")
    a.register_memory(regs)
    with pytest.raises(AssertionError, match="offset"):
        nixl_utils.ba_buf(target, 1024), nixl_utils.ba_buf(target, 0)
        import ctypes
        ctypes.memset(target + 7, 0, 1)
        nixl_utils.verify_transfer(addr, target, 1024)
    h = a.initialize_xfer("WRITE", a.get_xfer_descs([(addr, 1024, 0)], "DRAM"), a.get_xfer_descs([(target, 1024, 0)], "DRAM"), "my_agent")
    a.transfer(h)
    finish(a, h)
    nixl_utils.verify_transfer(addr, target, 1024)
    a.deregister_memory(regs)
    nixl_utils.free_passthru(addr), nixl_utils.free_passthru(target)


def test_backend_parameters():
    conf = nixl_agent_config(backends=["UCX"], backend_params={"UCX": {"UCX_TLS": "tcp,self"}})
    a, b = nixl_agent("a", conf), nixl_agent("b", conf)
    x = torch.zeros(16)
    b_tensor = torch.ones(16)
    a.register_memory(x), b.register_memory(b_tensor)
    a.add_remote_agent(b.get_agent_metadata())
    h = a.initialize_xfer("READ", a.get_xfer_descs(x), a.get_xfer_descs(b_tensor), "b")
    a.transfer(h)
    finish(a, h)
    assert x.all()
    nixl_agent("any machine", nixl_agent_config(backends=["UCX"], backend_params={"UCX": {"UCX_TLS": "rc,cuda_copy,cuda_ipc"}}))


def test_notifications():
    a, b = other("a"), other("remote_agent")
    a.add_remote_agent(b.get_agent_metadata())
    a.send_notif("remote_agent", b"custom_payload")
    seen = []
    until(lambda: [seen.append((sender, messages)) for sender, messages in b.get_new_notifs().items()])
    assert seen == [("a", [b"custom_payload"])]


def test_direct_address():
    """g: the initiator is another process and does not listen."""
    target = nixl_agent("target", nixl_agent_config(backends=["UCX"], enable_listen=True, listen_port=0))
    memory = torch.zeros(256, dtype=torch.uint8)
    target.register_memory(memory)
    code = textwrap.dedent("""
        import sys, torch
        from nixl._api import nixl_agent, nixl_agent_config
        init = nixl_agent("initiator", nixl_agent_config(backends=["UCX"]))
        ip, port, address = "127.0.0.1", int(sys.argv[1]), int(sys.argv[2])
        x = torch.full((256,), 5, dtype=torch.uint8)
        init.register_memory(x)
        init.fetch_remote_metadata("target", ip, port);  init.send_local_metadata(ip, port)
        while not init.check_remote_metadata("target"): pass
        h = init.initialize_xfer("WRITE", init.get_xfer_descs(x), init.get_xfer_descs([(address, 256, 0)], "DRAM"), "target", b"sent")
        init.transfer(h)
        while init.check_xfer_state(h) != "DONE": pass
        """)
    child = subprocess.run([sys.executable, "-c", code, str(target.get_listen_port()), str(memory.data_ptr())], timeout=60)
    assert child.returncode == 0
    until(lambda: target.check_remote_xfer_done("initiator", b"sent"))
    assert (memory == 5).all()


@pytest.mark.parametrize("tag", ["gradient", "worker"])
def test_many_to_one(tag):
    workers = [other(f"worker_{i}") for i in range(4)]
    aggregator = nixl_agent("aggregator", nixl_agent_config(backends=["UCX"]))
    sums = torch.zeros(4, 1024)
    aggregator.register_memory(sums)
    hs = []
    for i, w in enumerate(workers):
        w.tensors[0].fill_(i + 1)
        w.add_remote_agent(aggregator.get_agent_metadata())
        message = b"gradient" if tag == "gradient" else f"worker_{i}".encode()
        hs.append(w.initialize_xfer("WRITE", w.get_xfer_descs(w.tensors[0]), w.get_xfer_descs(sums[i]), "aggregator", message))
    [w.transfer(h) for w, h in zip(workers, hs)]
    for i in range(4):
        until(lambda: aggregator.check_remote_xfer_done(f"worker_{i}", tag.encode()))
    assert (sums.sum(0) == 10).all()
