"""lightllm: a configuration changed after it was made, a tensor registered as it is, the same peer added by many threads at once."""
import threading

import pytest
from agents import done, until
from nixl._api import nixl_agent, nixl_agent_config
from peer import Peer, serve_tensors

torch = pytest.importorskip("torch")


def test_decode_reads_from_prefill():
    with Peer(serve_tensors, "prefill") as other:
        conf = nixl_agent_config(backends=["UCX"])
        conf.capture_telemetry = True
        one = nixl_agent("decode", conf)
        tensor = torch.zeros(3000)
        reg_desc = one.register_memory(tensor)
        addr, length, device, meta = reg_desc[0]
        assert (addr, length, device, meta) == (tensor.data_ptr(), 12000, 0, b"")
        (metadata, packed), failures = other.receive(), []

        def load():
            try:
                for _ in range(20):
                    assert one.add_remote_agent(metadata) == b"prefill"
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not failures
        one.send_notif(remote_agent_name="prefill", notif_msg=b"x")
        assert other.receive() == ("decode", b"x")
        local = one.get_xfer_descs([tensor[1000 * i:1000 * (i + 1)] for i in range(3)])
        h = one.initialize_xfer("READ", local, one.deserialize_descs(packed), "prefill")
        one.transfer(h)
        done(one, h)
        assert tensor.view(3, 1000).unique(dim=1).flatten().tolist() == [1, 2, 3]
        assert one.get_xfer_telemetry(h).totalBytes == 12000
        one.release_xfer_handle(handle=h)
        one.remove_remote_agent("prefill")
        until(lambda: not one.check_remote_metadata("prefill"))
        other.send("stop")
