"""Dynamo: keyword calls, a key told at the post, release as cancel, and one worker added and removed over and over."""
import pytest
from agents import until
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer, serve_tensors

torch = pytest.importorskip("torch")


def test_cycles_of_one_worker():
    with Peer(serve_tensors, "worker") as other:
        one = nixl_agent("frontend", nixl_agent_config(backends=["UCX"]))
        target = torch.zeros(3000)
        one.register_memory([(target.data_ptr(), target.numel() * 4, 0, "cuda")], "cpu")  # the text is no part of the memory's kind
        metadata, packed = other.receive()
        for cycle in range(20):
            one.add_remote_agent(metadata)
            target.zero_()
            local = one.get_xfer_descs([(target.data_ptr() + 4000 * i, 4000, 0) for i in range(3)], "cpu")
            h = one.initialize_xfer(operation="READ", local_descs=local, remote_descs=one.deserialize_descs(packed),
                                    remote_agent="worker", notif_msg=b"")
            one.transfer(h, f"key{cycle}".encode())
            until(lambda: one.check_xfer_state(h) == "DONE")
            assert target.view(3, 1000).unique(dim=1).flatten().tolist() == [1, 2, 3]
            assert other.receive() == ("frontend", b"key%d" % cycle)
            one.release_xfer_handle(h)
            cancelled = one.initialize_xfer("READ", local, one.deserialize_descs(packed), "worker")
            one.transfer(cancelled)
            one.release_xfer_handle(cancelled)
            one.remove_remote_agent("worker")
        other.send("stop")
