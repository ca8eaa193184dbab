"""Ray, Dynamo, TensorRT-LLM, lightllm and the two-peer examples: what each relies on, against a peer in another process."""
import importlib
import threading

import numpy as np
import pytest
from agents import agent, done, until
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer

torch = pytest.importorskip("torch")


def holder(channel, name):
    one = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    tensors = [torch.full((1000,), float(i + 1)) for i in range(3)]
    one.register_memory(tensors)
    channel.send((one.get_agent_metadata(), one.get_serialized_descs(one.get_xfer_descs(tensors))))
    while True:
        for sender, messages in one.update_notifs().items():
            while messages:
                channel.send((sender, messages.pop(0)))
        if channel.poll(0.001):
            return


def test_ray():
    """Whole storages read with a UUID, the peer added again and again, removed while another's request runs."""
    with Peer(holder, "owner") as other:
        one = nixl_agent("ray", nixl_agent_config(backends=["UCX"]))
        metadata, packed = other.receive()
        for round_ in range(3):
            one.add_remote_agent(metadata)
            targets = [torch.zeros(1000) for _ in range(3)]
            regs = one.register_memory(targets, mem_type="cpu")
            h = one.initialize_xfer("READ", regs.trim(), one.deserialize_descs(packed), "owner", b"UUID%d" % round_)
            one.transfer(h)
            done(one, h)
            assert all((t == i + 1).all() for i, t in enumerate(targets))
            assert other.receive() == ("ray", b"UUID%d" % round_)
            one.release_xfer_handle(h)
            one.deregister_memory(regs)
            one.remove_remote_agent("owner")
        other.send("stop")


def test_dynamo():
    with Peer(holder, "worker") as other:
        one = nixl_agent("frontend", nixl_agent_config(backends=["UCX"]))
        target = torch.zeros(3000)
        one.register_memory([(target.data_ptr(), target.numel() * 4, 0, "cpu")], "cpu")
        metadata, packed = other.receive()
        for cycle in range(5):
            one.add_remote_agent(metadata)
            local = one.get_xfer_descs([(target.data_ptr() + 4000 * i, 4000, 0) for i in range(3)], "cpu")
            h = one.initialize_xfer(operation="READ", local_descs=local, remote_descs=one.deserialize_descs(packed),
                                    remote_agent="worker", notif_msg=b"")
            one.transfer(h, f"key{cycle}".encode())
            until(lambda: one.check_xfer_state(h) == "DONE")
            assert other.receive() == ("frontend", b"key%d" % cycle)
            one.release_xfer_handle(h)
            cancelled = one.initialize_xfer("READ", local, one.deserialize_descs(packed), "worker")
            one.transfer(cancelled)
            one.release_xfer_handle(cancelled)
            one.remove_remote_agent("worker")
        other.send("stop")


def test_tensorrt_llm():
    package = None
    for name in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            package = importlib.import_module(name)
            break
        except ImportError:
            continue
    one = package.nixl_agent("trt", package.nixl_agent_config(backends=["UCX"]))
    memory = np.zeros(4096, np.uint8)
    rows = [(memory.ctypes.data, 4096, 0, "")]
    descs = one.get_reg_descs(rows, "DRAM")
    assert descs is not None
    one.register_memory(descs)
    h = one.initialize_xfer("WRITE", one.get_xfer_descs([rows[0][:3]], "DRAM"), one.get_xfer_descs([rows[0][:3]], "DRAM"), "trt")
    assert isinstance(h, package.nixl_xfer_handle) and one.transfer(h) in ("PROC", "DONE")
    done(one, h)
    one.deregister_memory(one.get_reg_descs(rows, "DRAM"))


def test_lightllm():
    conf = nixl_agent_config(backends=["UCX"])
    conf.capture_telemetry = True
    one, two = nixl_agent("one", conf), agent("two", "UCX")
    tensor = torch.zeros(64)
    reg_desc = one.register_memory(tensor)
    addr, length, device, meta = reg_desc[0]
    assert (addr, length, device, meta) == (tensor.data_ptr(), 256, 0, b"")
    metadata, failures = two.get_agent_metadata(), []

    def load():
        try:
            for _ in range(20):
                assert one.add_remote_agent(metadata) == b"two"
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures
    one.send_notif(remote_agent_name="two", notif_msg=b"x")
    assert until(lambda: two.get_new_notifs()) == {"one": [b"x"]}
    h = one.initialize_xfer("WRITE", one.get_xfer_descs(tensor[:8]), one.get_xfer_descs(tensor[8:16]), "one")
    one.transfer(h)
    done(one, h)
    assert one.get_xfer_telemetry(h).totalBytes == 32
    one.release_xfer_handle(handle=h)


def test_two_peer_examples():
    target = nixl_agent("target", nixl_agent_config(True, True, 0))
    init = nixl_agent("initiator", nixl_agent_config(True, False))
    here, there = torch.ones(1000), torch.zeros(1000)
    init.register_memory(here), target.register_memory(there)
    port = target.get_listen_port()
    init.fetch_remote_metadata("target", "127.0.0.1", port)
    init.send_local_metadata("127.0.0.1", port)
    until(lambda: init.check_remote_metadata("target") and target.check_remote_metadata("initiator"))
    target.send_notif("initiator", target.get_serialized_descs(target.get_xfer_descs(there)))
    remote = init.deserialize_descs(until(lambda: init.get_new_notifs())["target"][0])
    local = init.prep_xfer_dlist("NIXL_INIT_AGENT", init.get_xfer_descs(here))
    far = init.prep_xfer_dlist("target", remote)
    h = init.make_prepped_xfer("WRITE", local, [0], far, [0], b"UUID")
    for round_ in range(3):
        here.fill_(round_)
        init.transfer(h)
        done(init, h)
        until(lambda: target.check_remote_xfer_done("initiator", b"UUID"))
        assert (there == round_).all()
    h.release(), local.release(), far.release()
    init.remove_remote_agent("target")
    init.invalidate_local_metadata("127.0.0.1", port)
    until(lambda: not target.check_remote_metadata("initiator"))


def test_partial_metadata_by_ip():
    target, sender = nixl_agent("target", nixl_agent_config(True, True, 0)), agent("sender", "UCX")
    tensor = torch.zeros(100)
    regs = sender.register_memory(tensor)
    sender.send_partial_agent_metadata(regs, True, ["UCX"], "127.0.0.1", target.get_listen_port())
    until(lambda: target.check_remote_metadata("sender", regs.trim()))
